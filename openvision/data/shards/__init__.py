"""Tar shards: random access to samples, the index beside each shard, the manifest of a folder, storage."""
