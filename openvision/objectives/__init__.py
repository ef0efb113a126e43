"""The losses: contrastive and caption, over one process or many. Imports nothing of the package."""
