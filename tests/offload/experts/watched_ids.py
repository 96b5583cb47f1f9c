"""Watches every `mul_mat_id` that this program computes, for the ids that some backend would crash or go wrong on."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend


class WatchedIds:
    """Notes which ids each graph multiplies with and looks at them before and after it runs.

    Every id must be that of a matrix of the stack, and no token may have one twice: repacked weights, Metal and CUDA's
    batches take neither. `n_seen` counts ids.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_seen = 0
        self._make_graph, self._multiply, self._compute = (
            ggml.ggml_new_graph_custom,
            ggml.ggml_mul_mat_id,
            CpuBackend.compute,
        )
        self._context: dict[int, int] = {}
        self._products: dict[int, list[tuple[int, int]]] = defaultdict(list)
        monkeypatch.setattr(ggml, "ggml_new_graph_custom", self._new_graph)
        monkeypatch.setattr(ggml, "ggml_mul_mat_id", self._mul_mat_id)
        monkeypatch.setattr(CpuBackend, "compute", lambda backend, graph: self._run(backend, graph))

    def _new_graph(self, ctx: int, *arguments: Any) -> int:
        graph: int = self._make_graph(ctx, *arguments)
        self._context[graph] = ctx
        self._products[ctx] = []
        return graph

    def _mul_mat_id(self, ctx: int, stack: int, rows: int, ids: int) -> int:
        self._products[ctx].append((ids, stack))
        product: int = self._multiply(ctx, stack, rows, ids)
        return product

    def _run(self, backend: CpuBackend, graph: int) -> None:
        self._look(graph)
        self._compute(backend, graph)
        self._look(graph)

    def _look(self, graph: int) -> None:
        for ids, stack in self._products[self._context[graph]]:
            values = _values(ids)
            assert values.min() >= 0
            assert values.max() < ggml.tensor_at(stack).ne[2]
            assert all(len(set(token)) == len(token) for token in values.tolist())
            self.n_seen += values.size


def _values(ids: int) -> np.ndarray[Any, Any]:
    """I32 [n_tokens, n_used], wherever in another tensor they lie."""
    tensor = ggml.tensor_at(ids)
    n_used, n_tokens = int(tensor.ne[0]), int(tensor.ne[1])
    whole = ggml.array_at(ggml.ggml_get_data(ids), np.int32, (n_tokens - 1) * int(tensor.nb[1]) // 4 + n_used)
    return np.lib.stride_tricks.as_strided(whole, (n_tokens, n_used), (int(tensor.nb[1]), 4)).copy()
