"""The model: vision tower, projector and language model as one stock LLaVA; its visual tokens and its answers."""
