"""Evaluators: zero-shot, retrieval, probes, baselines; each measures one model on one data set."""
