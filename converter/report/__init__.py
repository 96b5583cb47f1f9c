"""What a conversion lost: evaluation against the source, as Markdown, plots and a model card.

Only commands import it.
"""
