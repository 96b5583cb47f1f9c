"""How long carrying out a plan will take, tried for a moment on random weights of its types on this machine."""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.layout.offsets import FileLayout
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.quant.quantize import quantize_rows
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.type_costs import LOSSLESS
from slimoe.converter.write.matrix import stored_blocks

_SAMPLE = (64, 512)
_FEEDBACK_SAMPLE = (256, 256)
_BYTES_PER_SECOND = 250e6
"""Of reading weights and writing what becomes of them, on a disk that is not slow."""


def writing_seconds(
    source: ModelSource,
    plan: CompressPlan,
    layout: FileLayout,
    n_threads: int,
    per_weight: Callable[[Type], float] | None = None,
) -> float:
    """Seconds in all; blocks that are copied cost their bytes only.

    `per_weight` says the seconds that quantising a weight to a type takes one thread; by default it is tried.
    """
    counts: Counter[Type] = Counter()
    n_bytes = layout.n_bytes
    for tensor in layout.tensors:
        for matrix in tensor.matrices:
            if matrix.is_constant or stored_blocks(source, matrix):
                continue
            n_weights = matrix.shape[0] * matrix.shape[1]
            n_bytes += 2 * n_weights
            if matrix.type not in LOSSLESS and not matrix.key.name.endswith("ffn_gate_inp.weight"):
                counts[matrix.type] += n_weights
    seconds = per_weight or partial(seconds_per_weight, feedback=plan.feedback)
    computing = sum(n_weights * seconds(kind) for kind, n_weights in counts.items()) / n_threads
    return n_bytes / _BYTES_PER_SECOND + computing


def seconds_per_weight(kind: Type, *, feedback: bool = False) -> float:
    """Tries for a moment how long quantising a weight to a type takes one thread, with error feedback or without."""
    rng = np.random.default_rng(0)
    if feedback:
        # torch is heavy, and plans without feedback do without.
        from slimoe.converter.quant.block_layout import BITS
        from slimoe.converter.quant.feedback import Curvature, quantize_with_feedback

        feedback = kind in BITS
    rows = rng.standard_normal(_FEEDBACK_SAMPLE if feedback else _SAMPLE, np.float32)
    if feedback:
        curvature = Curvature.of(np.eye(rows.shape[1], dtype=np.float32))

    def quantise(some: NDArray[np.float32]) -> None:
        if feedback:
            quantize_with_feedback(some, curvature, kind)
        else:
            quantize_rows(some, kind, np.ones(rows.shape[1], np.float32))

    quantise(rows[:1])
    begin = time.perf_counter()
    quantise(rows)
    return (time.perf_counter() - begin) / rows.size
