"""What this process may use: memory, processors and threads, limits of control groups included.

It imports `offload.errors` alone, and everything else may import it.
"""
