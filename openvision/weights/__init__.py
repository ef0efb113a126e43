"""Read and write checkpoints: released names, model folders, JAX and open_clip layouts, exports to other libraries.

May import `models`, `text` and `images`.
"""
