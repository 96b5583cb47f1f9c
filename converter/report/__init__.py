"""Evaluation of a converted file against its source, reported as JSON, Markdown, plots and a model card.

Only commands import it.
"""
