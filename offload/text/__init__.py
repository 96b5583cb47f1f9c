"""From text to tokens and back: vocabularies, tokenizers, sampling.

It computes no logits. The engine, the server and the converter's checks use it.
"""
