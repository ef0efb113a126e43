"""Frozen encoders that a student is distilled from: ours, those of other libraries, and what they say on disk.

May import models, weights, data and images.
"""
