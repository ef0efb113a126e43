"""Conversations with images: reading, rendering, batching, and cached features of a frozen encoder."""
