"""Metrics on plain arrays: ranks, bootstrap intervals, calibration, probes, patch tokens."""
