"""The engine: opens a GGUF file, and turns requests into tokens."""
