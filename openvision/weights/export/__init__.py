"""Exports: timm, transformers, open_clip, ONNX; each is loaded there and compared before it is kept."""
