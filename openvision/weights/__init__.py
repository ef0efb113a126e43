"""Checkpoints in and out: released names, folders, JAX and open_clip layouts, exports to other libraries.

May import `models`, `text` and `images`.
"""
