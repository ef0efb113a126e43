"""The commands `openvision data make`, `stats`, `verify` and `preview`."""
