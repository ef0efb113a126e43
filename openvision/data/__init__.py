"""Shards, pictures, augmentation and the stream of batches."""

import logging

# Grain looks for JAX's profiler when it is imported and warns that it is not there; nobody here misses it.
logging.getLogger("absl").setLevel(logging.ERROR)
