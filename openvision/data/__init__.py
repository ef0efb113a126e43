"""Training data: WebDataset shards and the stream of batches read from them.

`shards` reads and writes tar shards, `tools` makes and inspects them, `recap` joins Recap-DataComp-1B, `sources` draws
data sets that need no download. May import `text` and `images`.
"""

import logging

# Grain looks for JAX's profiler when it is imported and warns that it is not there; nobody here misses it.
logging.getLogger("absl").setLevel(logging.ERROR)
