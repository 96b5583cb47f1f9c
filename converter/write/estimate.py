"""How long carrying out a plan will take, tried for a moment on random weights of its types on this machine."""

import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType as Type

from slimoe.converter.layout.offsets import FileLayout
from slimoe.converter.quant.quantize import quantize_rows
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.type_costs import LOSSLESS
from slimoe.converter.write.matrix import stored_blocks

_SAMPLE = (64, 512)
_BYTES_PER_SECOND = 250e6
"""Of reading weights and writing what becomes of them, on a disk that is not slow."""


def seconds_per_weight(kind: Type) -> float:
    """Tries for a moment how long quantising a weight to a type takes one thread."""
    rows = np.random.default_rng(0).standard_normal(_SAMPLE, np.float32)
    importance = np.ones(rows.shape[1], np.float32)
    quantize_rows(rows[:1], kind, importance)
    begin = time.perf_counter()
    quantize_rows(rows, kind, importance)
    return (time.perf_counter() - begin) / rows.size


def writing_seconds(
    source: ModelSource,
    layout: FileLayout,
    n_threads: int,
    per_weight: Callable[[Type], float] = seconds_per_weight,
) -> float:
    """Seconds in all but for error feedback; blocks that are copied cost their bytes only.

    `per_weight` says the seconds that quantising a weight to a type takes one thread.
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
    computing = sum(n_weights * per_weight(kind) for kind, n_weights in counts.items()) / n_threads
    return n_bytes / _BYTES_PER_SECOND + computing
