"""Clients that others wrote, each run by an interpreter of its own against a running server."""
