"""Scorers: one module for each benchmark, with its official metric."""
