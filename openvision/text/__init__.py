"""Texts to ids: the tokenizer, its vocabulary, and which texts of a sample are read. Imports nothing of the package."""
