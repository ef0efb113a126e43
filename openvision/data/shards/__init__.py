"""Tar shards: dataset and writer, index of a shard, manifest of a folder, local and remote storage."""
