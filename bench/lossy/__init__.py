"""Lossy modes measured: what they cost in quality where they save as much."""
