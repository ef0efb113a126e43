"""Frozen encoders that a student is distilled from: ours and those of other libraries, read alike.

May import models and weights.
"""
