"""Requests in turn: a scheduler that batches sequences, and slots, which clients save and restore.

It knows tokens only; text is the business of `offload.text`.
"""
