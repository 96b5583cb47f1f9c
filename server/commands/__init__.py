"""The commands of `slimoe`, one per file.

Nothing imports a command but the command line.
"""
