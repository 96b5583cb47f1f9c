"""Healing: the small tensors of a compressed file are trained until it says again what its source says.

`heal` is the entry point; `cost` says beforehand what it takes.
"""
