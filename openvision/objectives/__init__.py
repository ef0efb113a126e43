"""The losses: contrastive and caption, over one process or many. Imports `runtime` only."""
