"""Training: the trainer, its step, objectives, gradient caching, optimizer and guards.

`setup` makes the parts of a run, `checkpoint` saves and restores it, `run` is its folder, log and supervision.
May import everything below it, `evaluation` included; nothing below imports it.
"""
