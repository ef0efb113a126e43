"""Checkpoints of a run: folders, tensors, saving in the background, restoring, export."""
