"""The offload engine: GGUF in, logits out. It knows no HTTP."""
