"""Tensors out: matrices are read, quantised and written as a layout says.

It decides nothing.
"""
