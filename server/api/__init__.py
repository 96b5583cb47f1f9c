"""The endpoints: bodies checked, requests made, answers written in the API's words.

`server.app` lists them.
"""
