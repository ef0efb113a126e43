"""The demo in the browser: `openvision demo`. `checkpoint.py` and `collection.py` know nothing of Gradio.

May import `inference` and everything below it.
"""
