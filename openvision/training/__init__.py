"""Training: the trainer, the step, its losses and optimizer.

`setup` makes the parts of a run, `checkpoint` saves and restores it, `run` is its folder, log and supervision.
May import everything below it, `evaluation` included; nothing below imports it.
"""
