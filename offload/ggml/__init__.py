"""The C libraries ggml and llama.cpp as Python calls: operations, buffers, devices, backends.

It knows no model. Every folder of the engine that computes may import it.
"""
