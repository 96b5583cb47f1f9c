"""The families of Hugging Face checkpoints that are read, each a table: settings, and names of tensors.

Only `converter.source` imports it.
"""
