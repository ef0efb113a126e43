"""Recipes: schema, TOML text, show/diff/validate, and the smoke form.

Used by training, planning, multimodal and the command line. May import `models`, `images`, `text` and `data`.
"""
