"""The commands `openvision data make`, `verify`, `stats` and `preview`."""
