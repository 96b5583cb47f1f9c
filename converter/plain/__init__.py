"""Conversion of a whole model to one mix of types, and to files with two copies of each expert.

Commands use it; compression goes by `budget` and `layout`.
"""
