"""Compressed models as Hugging Face checkpoints: what their class can hold, their config.json, tensors and files.

`export` puts the others together.
"""
