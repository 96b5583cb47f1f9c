"""The computation of one step: attention, router and expert FFN as ggml graphs, with their weights and KV cache.

It computes with experts that are in memory; where an expert comes from is the business of `offload.experts`.
"""
