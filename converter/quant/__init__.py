"""Blocks of ggml's types: quantising, error feedback, named mixes of types.

It knows matrices, not models.
"""
