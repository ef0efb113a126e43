"""Bytes to pixels: decoding, preprocessing for evaluation, augmentation for training."""
