"""The MoE step across tiers: the experts of one layer, computed on the host and on devices, and what loads them.

It stands on `graph`, `cache` and `lossy`; only the opening of a model imports it.
"""
