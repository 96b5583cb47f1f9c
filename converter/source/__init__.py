"""Models as they come: Hugging Face checkpoints and GGUF files, their settings and tensors.

Everything else in the converter reads models through `ModelSource`.
"""
