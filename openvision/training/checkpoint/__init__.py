"""Checkpoints of a run: save in the background, restore at any number of processes, list, verify, export.

May import `recipe`, `text`, `weights` and the optimizer.
"""
