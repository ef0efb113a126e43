"""Tokenizer, learning of its vocabulary, and the choice of a sample's texts. Imports nothing else of the package."""
