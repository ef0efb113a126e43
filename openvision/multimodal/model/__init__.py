"""The model: tower, projector and language model, built from stock transformers classes, and its answers."""
