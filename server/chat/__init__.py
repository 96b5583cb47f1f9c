"""Messages to prompts: history, chat templates in a process of their own, tokens.

The engine's process and `slimoe run` use it.
"""
