"""Texts that tokenizers get wrong."""

from converter.tokenizer_check import HARD_TEXTS

NASTY_TEXTS = HARD_TEXTS
