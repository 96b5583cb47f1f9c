"""The GGUF writer: header, keys that come late, bytes and digests.

It knows no model.
"""
