"""Use trained encoders: load, encode, classify, search, caption, embed a data set.

May import `encoding`, `weights`, `data` and everything below them; nothing of evaluation or training.
"""
