"""Modes that trade accuracy for speed: low-bit copies, constant experts and skipped experts, and their limits.

It decides from what the cache says; `offload.experts` carries it out.
"""
