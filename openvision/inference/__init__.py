"""Trained encoders in use: load, encode, classify, search, caption, embed a data set.

May import `encoding`, `weights` and what is below them.
"""
