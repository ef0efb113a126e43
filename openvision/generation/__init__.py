"""Images out of an encoder: training of our own autoencoder, and a generator on the tokens of OpenVision 3.

May import `models`, `text`, `images`, `data`, `weights`, `encoding`, `runtime`, `evaluation` and `frozen`.
"""
