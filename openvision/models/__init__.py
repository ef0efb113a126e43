"""The models: vision tower, text tower, caption decoders, the CPU kernels under them, and their FLOPs.

Imports nothing of the package but `errors`, `files` and `runtime`.
"""
