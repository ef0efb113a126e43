"""Reports: the page of a run, the page that compares checkpoints, figures, galleries, tables."""
