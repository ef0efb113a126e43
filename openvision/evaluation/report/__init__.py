"""Reports: the page of a run and the page that compares checkpoints, with the figures, examples and tables they use."""
