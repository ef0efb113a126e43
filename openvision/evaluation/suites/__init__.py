"""Suites: named lists of evaluators, run on checkpoints; results as files, comparisons, published numbers."""
