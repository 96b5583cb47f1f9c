"""Tokenizers of checkpoints, read and written as a GGUF file holds them, or refused where it cannot.

Only `converter.source` and the conversion import it.
"""
