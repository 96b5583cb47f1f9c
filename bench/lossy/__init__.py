"""What saves memory for some exactness, measured: lossy modes, and types of tensors and of the KV cache."""
