"""Measurements: true-shape random models, and this engine next to llama.cpp on the same file."""
