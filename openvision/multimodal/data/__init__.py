"""Conversations with images: reading, tokenizing, batching, and cached features of a frozen encoder."""
