"""Data sets rendered from packages, without a download of images: `openmoji`, `picto` and `scenes`."""
