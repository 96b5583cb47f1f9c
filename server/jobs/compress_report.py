"""What is told of a compressed file before it is made: what is kept, in which types, bytes, expected loss, loaders."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from slimoe.converter.budget.planned_source import ExactMatrices, PlannedSource
from slimoe.converter.layout.layer import matrix_width
from slimoe.converter.layout.offsets import FileLayout
from slimoe.converter.layout.plan import CompressPlan, ExpertPlan, LayerPlan
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.quant.unfit_types import unfit_counts, unfit_notes
from slimoe.converter.recipe.toml_file import recipe_text
from slimoe.converter.source.model_source import PROJECTIONS, active_weights
from slimoe.converter.source.tasks import task_note, tasks_of
from slimoe.offload.resources.memory import human
from slimoe.server.jobs.compress_plan import CompressWork
from slimoe.server.terminal.progress_bars import duration

_LOADERS = {"stock": ("llama.cpp", "slimoe"), "native": ("slimoe",)}

_FEWER = "neither types nor narrower experts reach this size: more is left out than was asked for, as the table says"


def loaders(work: CompressWork) -> tuple[str, ...]:
    """Programs that load the file."""
    return _LOADERS[work.plan.format]


def bits_per_weight(work: CompressWork) -> float:
    """The file's bits for each weight of the source."""
    return 8 * work.layout.n_bytes / sum(math.prod(shape) for shape in work.source.shapes.values())


def planned_active_weights(work: CompressWork) -> int:
    """The weights of the file that a token is multiplied with or looks up."""
    return active_weights(PlannedSource(work.source, work.plan, ExactMatrices(work.source)))


def layer_bytes(layout: FileLayout) -> Counter[int]:
    """Tensor bytes by layer of the result, -1 for what belongs to none."""
    sizes: Counter[int] = Counter()
    for tensor in layout.tensors:
        sizes[layer_and_role(tensor.name)[0]] += tensor.n_bytes
    return sizes


# --- for programs ------------------------------------------------------------------------------------------


def work_fields(work: CompressWork) -> dict[str, Any]:
    """All of it as JSON has it. `block` and `members` are the source's numbers, sizes are bytes, the loss is KL
    divergence per token in nats."""
    plan, layout, sizes = work.plan, work.layout, layer_bytes(work.layout)
    return {
        "source": str(work.source.path),
        "format": plan.format,
        "loads_in": list(loaders(work)),
        "n_bytes": layout.n_bytes,
        "bits_per_weight": round(bits_per_weight(work), 4),
        "n_active_weights": planned_active_weights(work),
        "expected_kl": plan.expected_kl,
        "expected_kl_lacks": list(plan.uncounted),
        "n_main_experts": plan.n_main or None,
        "tasks": {name: task.tokens for name, task in tasks_of(layout.metadata).items()},
        "bytes_by_type": layout.bytes_by_type,
        "unfit_types": unfit_counts(work.matrices),
        "token_type": plan.token_type.name,
        "output_type": None if plan.output_type is None else plan.output_type.name,
        "layers": [
            {
                "block": layer.block,
                "attention": _attention(layer) if layer.has_attention else None,
                "dense_or_shared": _dense_or_shared(layer),
                "experts": [
                    {
                        "members": list(expert.members),
                        "types": [kind.name for kind in expert.types],
                        "low_types": None if expert.low_types is None else [kind.name for kind in expert.low_types],
                        "width": _width(expert),
                    }
                    for expert in layer.experts
                ],
                "n_constants": _n_constants(layer),
                # What the version before called it.
                "n_novices": _n_constants(layer),
                "n_bytes": sizes[index],
            }
            for index, layer in enumerate(plan.layers)
        ],
        "recipe": plan.recipe,
    }


def _attention(layer: LayerPlan) -> dict[str, str]:
    """Types of attention's matrices by role."""
    return {role: kind.name for role, kind in layer.types.items() if role.startswith("attn_")}


def _dense_or_shared(layer: LayerPlan) -> dict[str, str]:
    """Types by role of the feed-forward matrices that every token passes."""
    return {role: kind.name for role, kind in layer.types.items() if role.startswith("ffn_")}


def _width(expert: ExpertPlan) -> int | None:
    """Its neurons, if it is narrower than it was; merged ones have as many as before, whether chosen yet or not."""
    return None if expert.kept is None or expert.is_joined else len(expert.kept)


def _n_constants(layer: LayerPlan) -> int:
    """Constant experts in the place of pruned ones; those that may stand in for kept experts are not counted."""
    return -min((0, *layer.target))


# --- for people --------------------------------------------------------------------------------------------


def work_lines(work: CompressWork) -> list[str]:
    """A table of layers and projections, equal neighbours in one row, and the file as a whole."""
    head = ("layers", _attention_head(work.plan), "experts", "gate", "up", "down", "dense or shared", "each layer")
    rows = [head, *_layer_rows(work)]
    if all(row[3] == row[4] for row in rows[1:]):
        rows = [(*row[:3], "gate, up" if row is head else row[3], *row[5:]) for row in rows]
    elif all(row[3] == "-" for row in rows[1:]):
        rows = [(*row[:3], *row[4:]) for row in rows]
    if all(row[-2] == "-" for row in rows[1:]):
        rows = [(*row[:-2], row[-1]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    plan, layout = work.plan, work.layout
    gone = sorted(set(range(work.source.spec.n_layer)) - {layer.block for layer in plan.layers})
    by_type = ", ".join(f"{name} {human(n_bytes)}" for name, n_bytes in layout.bytes_by_type.items())
    output = "" if plan.output_type is None else f", output {plan.output_type.name}"
    bits = f"{bits_per_weight(work):.2f} bits for each weight of the source"
    return [
        *table,
        "",
        *([f"layers left out whole: {_numbers(gone)}"] if gone else []),
        f"token table {plan.token_type.name}{output}; by type: {by_type}",
        *unfit_notes(work.matrices, len(layout.tensors)),
        f"{layout.n_bytes:,} bytes ({human(layout.n_bytes)}), {bits}",
        f"a token uses {planned_active_weights(work):,} weights, of the source {active_weights(work.source):,}",
        *([_FEWER] if recipe_text(work.recipe) != plan.recipe else []),
        expected_loss(work.plan),
        *([note] if (note := task_note(layout.metadata)) else []),
        f"{plan.format} format: loads in {' and '.join(loaders(work))}",
    ]


def expected_loss(plan: CompressPlan) -> str:
    """What the statistics say, and what they do not."""
    kl, missing = plan.expected_kl, " and ".join(plan.uncounted)
    if kl is None:
        return "expected loss unknown: there are no statistics"
    if not missing:
        return f"expected loss {kl:.4f} nats of KL per token"
    if kl == 0:
        return f"expected loss unknown: {missing} are not counted"
    return f"expected loss {kl:.4f} nats of KL per token, and what {missing} cost"


def _layer_rows(work: CompressWork) -> Iterable[tuple[str, ...]]:
    """The table's rows: layers in a row that are alike are one of them."""
    sizes, rows = layer_bytes(work.layout), []
    for index, layer in enumerate(work.plan.layers):
        attention = _joined(_attention(layer)) if layer.has_attention else "none"
        n_missing = len(PROJECTIONS) - len(work.source.spec.architecture.projections)
        numbers = range(len(PROJECTIONS) - n_missing)
        projections = ["-"] * n_missing + [_types(layer.experts, number) for number in numbers]
        others = _joined(_dense_or_shared(layer))
        rows.append((layer.block, (attention, _experts(work, layer), *projections, others, human(sizes[index]))))
    for row, group in groupby(rows, key=lambda pair: pair[1]):
        yield (_numbers([block for block, _ in group]), *row)


def _attention_head(plan: CompressPlan) -> str:
    """`attention q k v o`, or what else the layers' matrices are called (latent attention has other ones)."""
    names = {role: role.removeprefix("attn_") for layer in plan.layers for role in _attention(layer)}
    return " ".join(("attention", *("o" if name == "output" else name for name in names.values())))


def _joined(kinds: Mapping[str, str]) -> str:
    """The type that all have, or each one's; `-` without any."""
    names = set(kinds.values())
    return names.pop() if len(names) == 1 else " ".join(kinds.values()) or "-"


def _experts(work: CompressWork, layer: LayerPlan) -> str:
    if not layer.experts:
        return "none"
    n_before = work.source.layers[layer.block].n_stored
    n_members = sum(len(expert.members) for expert in layer.experts)
    text = f"{len(layer.experts)} of {n_before}"
    text += " merged" if n_members > len(layer.experts) else ""
    n_constants = _n_constants(layer)
    text += f" + {n_constants} constant{'s' if n_constants > 1 else ''}" if n_constants else ""
    text += f", {work.plan.n_main} of {work.source.spec.n_expert_used} used computed" if layer.aux is not None else ""
    if all(_width(expert) is None for expert in layer.experts):
        return text
    # Beside narrower experts some may be whole.
    widths = sorted({matrix_width(work.source, layer.block, expert) for expert in layer.experts})
    return f"{text}, {' to '.join(map(str, dict.fromkeys((widths[0], widths[-1]))))} wide"


def _types(experts: Sequence[ExpertPlan], projection: int) -> str:
    """`Q4_K`; how many experts have which of two; of more the span and the mean. Second copies behind a plus."""
    text = _span(Counter(expert.types[projection] for expert in experts))
    low = _span(Counter(expert.low_types[projection] for expert in experts if expert.low_types))
    return f"{text}+{low}" if low else text or "-"


def _span(kinds: Counter[GGMLQuantizationType]) -> str:
    if len(kinds) > 2:
        order = sorted(kinds, key=_bits)
        mean = sum(n * _bits(kind) for kind, n in kinds.items()) / kinds.total()
        return f"{order[0].name} to {order[-1].name}, {mean:.1f} bits"
    if len(kinds) == 2:
        return " ".join(f"{n}x{kind.name}" for kind, n in kinds.most_common())
    return "".join(kind.name for kind in kinds)


def _bits(kind: GGMLQuantizationType) -> float:
    n_weights, n_bytes = GGML_QUANT_SIZES[kind]
    return float(8 * n_bytes / n_weights)


def _numbers(numbers: Sequence[int]) -> str:
    """`0-2, 5`."""
    spans = [
        [number for _, number in group] for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def announced(work: CompressWork, target: Path, seconds: float) -> str:
    """One line on what will be written."""
    names, loss = " and ".join(loaders(work)), expected_loss(work.plan)
    return (
        f"{target}: {work.layout.n_bytes:,} bytes will be written in about {duration(seconds)}, {loss}; "
        f"{work.plan.format} format for {names}"
    )
