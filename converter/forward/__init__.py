"""The model's forward pass in torch, layer by layer, over texts that need not fit in memory with it.

`stats`, `methods` and `report` stand on it.
"""
