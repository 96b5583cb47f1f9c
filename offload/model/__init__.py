"""What a model is: its architecture and sizes, its tensors, its experts, and the native file format.

The engine's graph, cache and plan read it, and so does the converter.
"""
