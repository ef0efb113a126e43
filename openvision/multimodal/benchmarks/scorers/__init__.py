"""Scorers: one module per benchmark, each with the official metric."""
