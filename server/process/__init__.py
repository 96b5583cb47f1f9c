"""The engine's process: started, watched, spoken to by messages, started again.

`server.app` and the endpoints speak to its `Supervisor`.
"""
