"""Drafted tokens measured: what they gain on text that repeats, and cost on text that does not."""
