"""What the server tells of itself while it runs: events for whoever listens, and a record of each request.

It holds figures, names and states, never what a prompt or an answer says.
"""
