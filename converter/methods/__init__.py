"""Pruning, merging and trimming of experts as pure mathematics on tensors and statistics.

It reads no file and knows no budget.
"""
