"""Requests in turn: a scheduler that batches sequences, and the KV cells that they share.

It knows tokens only; text is the business of `offload.text`.
"""
