"""Long work behind a command: planning, compressing, evaluating, and an engine in the command's own process.

Only commands import it.
"""
