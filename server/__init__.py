"""HTTP in, tokens out, and the `slimoe` command.

It knows no tensor: the engine runs in a process of its own.
"""
