"""Checkpoint in, GGUF out."""
