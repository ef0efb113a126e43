"""Caption decoders: the parallel one of OpenVision 1, the autoregressive one of 2 and 3, and groups by length."""
