"""Images out of an encoder: training of our own autoencoder, a generator on the tokens of OpenVision 3, its measures.

May import `models`, `text`, `images`, `data`, `weights`, `encoding`, `runtime`, `evaluation` and `frozen`.
"""
