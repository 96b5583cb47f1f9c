"""Recipes in TOML: fields, checks and the shipped files.

`budget` reads recipes; commands open them.
"""
