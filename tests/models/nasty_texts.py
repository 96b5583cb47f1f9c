"""Texts that tokenizers get wrong."""

from slimoe.converter.source.tokenizer.check import HARD_TEXTS

NASTY_TEXTS = HARD_TEXTS
