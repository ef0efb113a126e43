"""Data sets drawn here from packages, so that nothing has to be downloaded."""
