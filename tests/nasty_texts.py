"""Texts that tokenizers get wrong."""

from converter.hard_texts import HARD_TEXTS

NASTY_TEXTS = HARD_TEXTS
