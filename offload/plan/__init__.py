"""What will be loaded where, before anything is loaded, and what it will cost.

One verdict serves `plan`, `run` and `serve`; opening a model carries the plan out.
"""
