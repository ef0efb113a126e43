"""Data sets of evaluation: images with labels or captions from folders, shards, COCO files or Hugging Face."""
