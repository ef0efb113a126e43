"""From the bytes of an image to uint8 pixels: decoding, preprocessing for inference, augmentation for training.

Imports nothing of the package but errors.
"""
