"""All parts of all blocks in one order, by the same measure.

Source: LLM-Drop (arXiv 2406.15786), which joins attentions and feed-forward parts. A block's cosine is lower than those
of its parts, so that adding blocks changes little; and parts differ much in bytes, which `removal.removed_keys` names.
"""

from collections.abc import Collection, Sequence

from slimoe.converter.methods.attention_drop import attention_removals
from slimoe.converter.methods.block_drop import block_removals
from slimoe.converter.methods.layer_drop import layer_removals
from slimoe.converter.methods.removal import Part, Removal, ranked
from slimoe.converter.source.model_source import SourceLayer
from slimoe.converter.stats.statistics import Statistics


def joint_removals(
    statistics: Statistics,
    layers: Sequence[SourceLayer],
    parts: Collection[Part] = ("ffn", "attention"),
) -> tuple[Removal, ...]:
    """Everything of these kinds, the most dispensable first."""
    found: dict[Part, tuple[Removal, ...]] = {
        "ffn": layer_removals(statistics, layers),
        "attention": attention_removals(statistics, layers),
        "block": block_removals(statistics, layers),
    }
    return ranked(removal for part in parts for removal in found[part])
