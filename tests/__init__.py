"""Tests; each makes the tiny models that it needs."""
