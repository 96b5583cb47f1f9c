"""The neurons of one expert: how their activations go together, and which of them it can do without.

Pure mathematics on activations and matrices, which knows no model.
"""
