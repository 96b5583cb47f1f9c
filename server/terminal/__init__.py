"""What a person sees at a terminal: progress, tables, the chat prompt.

Only commands import it.
"""
