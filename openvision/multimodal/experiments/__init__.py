"""Experiments: the same model around several encoders, and a demonstration that runs on a CPU."""
