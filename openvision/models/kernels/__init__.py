"""Kernels of the layers: one dispatch between stock PyTorch operations and faster ones for training on a CPU.

Imports nothing of the package.
"""
