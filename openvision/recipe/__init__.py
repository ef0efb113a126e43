"""Recipes: the schema of a run, its TOML text, views of it, and the smoke form.

Read by training, planning, multimodal and the command line. May import `models`, `images`, `text`
and `data`.
"""
