"""Measurements and attacks that one runs; each ends with one JSON line."""
