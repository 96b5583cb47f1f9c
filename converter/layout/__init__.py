"""The file to be written, as values: which tensor in which type from which parts of the source, at which offset.

`budget` and `recipe` make layouts, `write` carries them out.
"""
