"""Training data: WebDataset shards and the stream of batches read from them.

`shards` reads and writes tar shards, `tools` makes and inspects them, `recap` joins Recap-DataComp-1B, `sources`
renders data sets from packages. May import `text` and `images`.
"""

import logging

# On import Grain warns that JAX's profiler is missing; nothing here uses it.
logging.getLogger("absl").setLevel(logging.ERROR)
