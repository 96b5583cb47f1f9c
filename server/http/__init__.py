"""Connections: who may connect, how many, how long, bodies taken in, events sent out.

It knows no endpoint.
"""
