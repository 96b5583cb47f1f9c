"""A GGUF file's header and keys, read and checked.

It knows no model; `offload.model` reads a model out of what stands here.
"""
