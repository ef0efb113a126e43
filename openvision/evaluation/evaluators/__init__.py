"""Evaluators: zero-shot, retrieval, probes, caption loss, baselines; each measures one model on one data set."""
