"""The endpoints, which `server.app` lists.

A dialect of the API is a file such as `chat_api.py`: it turns a client's body into `Choice`s, the one form in which
everything that generates is asked for, and has a `Shape`, which writes what comes of them.
"""
