"""How long carrying out a plan will take, tried for a moment on random weights of its types on this machine."""

import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType as Type

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


def writing_seconds(source: ModelSource, plan: CompressPlan, layout: FileLayout, n_threads: int) -> float:
    """Seconds in all; blocks that are copied cost their bytes only."""
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
    per_weight = _with_feedback if plan.feedback else _plain
    computing = sum(n_weights * per_weight(kind) for kind, n_weights in counts.items()) / n_threads
    return n_bytes / _BYTES_PER_SECOND + computing


def _plain(kind: Type) -> float:
    rows = np.random.default_rng(0).standard_normal(_SAMPLE, np.float32)
    importance = np.ones(_SAMPLE[1], np.float32)
    quantize_rows(rows[:1], kind, importance)
    return _seconds(lambda: quantize_rows(rows, kind, importance)) / rows.size


def _with_feedback(kind: Type) -> float:
    # torch is heavy, and plans without feedback do without.
    from slimoe.converter.quant.block_layout import BITS
    from slimoe.converter.quant.feedback import quantize_with_feedback
    from slimoe.converter.write.error_feedback import EFFORT

    if kind not in BITS:
        return _plain(kind)
    rows = np.random.default_rng(0).standard_normal(_FEEDBACK_SAMPLE, np.float32)
    hessian = np.eye(_FEEDBACK_SAMPLE[1], dtype=np.float32)
    quantize_with_feedback(rows[:1], hessian, kind, EFFORT)
    return _seconds(lambda: quantize_with_feedback(rows, hessian, kind, EFFORT)) / rows.size


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
