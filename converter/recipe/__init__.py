"""Recipes of compressed models, in TOML: their fields and checks, and the reader of shipped and own files.

`budget` makes plans of recipes; commands open them.
"""
