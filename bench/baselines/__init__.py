"""Baselines: llama.cpp's own quantiser, decoding and RPC server, driven in turn with ours."""
