"""Steps of one token in one graph, for as long as every expert is in host memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.expert_uses import ExpertUses
from slimoe.offload.cache.host_pool import HostPool
from slimoe.offload.cache.policy import Policy
from slimoe.offload.experts.constant_experts import ConstantExperts
from slimoe.offload.experts.device_part import DevicePart
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.graph.batch import Batch
from slimoe.offload.graph.expert_lookup import ExpertLookup, LayerTable, matrix_structure, stacked_structure
from slimoe.offload.graph.runner import Hidden, Logits, Runner
from slimoe.offload.graph.step import graph_bytes
from slimoe.offload.graph.token_rows import TokenRows
from slimoe.offload.graph.weights import FormRule, ModelWeights, WeightStore, load_weights
from slimoe.offload.model.experts import ExpertLayer, MatrixClass
from slimoe.offload.model.regrouped import as_matrix
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources

_MAX_GRAPHS = 3
"""Shapes of steps that are kept: one serves 256 tokens."""
_TOLD_EVERY = 8
"""Steps of which one is told to the cache policy, which is asked only after the host expert cache was made smaller."""


def single_token_bytes(spec: ModelSpec, layers: Sequence[ExpertLayer | None]) -> int:
    """An upper estimate of the memory that such steps take, without one token's intermediate results."""
    tables = sum(LayerTable.n_bytes_of(layer, spec.n_embd_expert) for layer in layers if layer is not None)
    graphs = _MAX_GRAPHS * graph_bytes(spec, is_looked_up=True)
    return tables + graphs


Repacked = Mapping[tuple[int, int], tuple[tuple[NDArray[np.uint8], int] | None, ...]]
"""By layer and expert the structures of its matrices that are rearranged, and where they are; None for others."""


@dataclass(frozen=True, slots=True, eq=False)
class SingleWeights:
    """What steps of one token multiply with: all weights but the experts, and those of these that are repacked."""

    model: ModelWeights
    experts: Repacked


def load_single_weights(
    store: WeightStore, sources: ModelSources, joined: ModelSources, form: FormRule, table: int | None
) -> SingleWeights:
    """Loads what is wanted repacked, and finds the rest in the store.

    `sources` are a native file's own, `joined` the same without experts, as they are multiplied with; `table` is what
    stands for the token table, if anything does.
    """
    weights, found = load_weights(store, joined, form, table), {}
    for index, layer in enumerate(sources.layers):
        if layer.buckets is None:
            continue
        stacks = [[as_matrix(stack) for stack in bucket] for bucket in layer.buckets.buckets]
        for expert, copy, bucket, slot in layer.buckets.layout.slots():
            if copy == 0:
                found[index, expert] = tuple(
                    stacked_structure(store.weight(stack, "repacked"), slot) if form(stack) == "repacked" else None
                    for stack in stacks[bucket]
                )
    store.release_staging()
    return SingleWeights(weights, found)


class SingleTokenSteps:
    """Computes steps of one token while the host expert cache has all experts; `part` is all layers on the CPU.

    `weights` are the part's own where nothing is repacked, and `told` is who is told of selected experts.
    """

    def __init__(
        self,
        spec: ModelSpec,
        part: DevicePart,
        rows: TokenRows | None,
        layers: Sequence[ExpertLayer | None],
        constants: ConstantExperts,
        host_pool: HostPool,
        told: tuple[Policy, ExpertUses],
        weights: SingleWeights | None,
        *,
        has_hidden: bool = False,
    ) -> None:
        weights = weights or SingleWeights(part.weights, {})
        self._repacked, self._structures = weights.experts, dict[MatrixClass, NDArray[np.uint8]]()
        assert isinstance(part.backend, CpuBackend)
        assert part.cache is not None
        self._layers = {index: layer for index, layer in enumerate(layers) if layer is not None}
        self._host_pool, self._n_resized = host_pool, host_pool.n_resized
        self._tables = {index: LayerTable.of(layer, constants.get(index)) for index, layer in self._layers.items()}
        activation = spec.architecture.activation
        self._lookup = ExpertLookup(part.backend, spec.n_embd_expert, spec.n_expert_used, activation, self._tables)
        self._told = _Told(self._layers, *told)
        self._is_ready = self._write_tables()
        self._runner = Runner(
            spec,
            part.backend,
            part.cache,
            lambda _: weights.model,
            rows,
            1,
            self._told,
            self._lookup,
            _MAX_GRAPHS,
            has_hidden=has_hidden,
        )

    @property
    def hidden(self) -> Hidden:
        """The last hidden states of the step before, [1, n_embd], where they are wanted."""
        return self._runner.hidden

    @property
    def compute_bytes(self) -> int:
        """Memory of the tables and of intermediate results."""
        n_bytes: int = self._lookup.n_bytes + self._runner.compute_bytes
        return n_bytes

    def is_ready(self) -> bool:
        """Whether all experts are in memory; looks where they are if the host expert cache has changed its size."""
        pool = self._host_pool
        if self._n_resized != pool.n_resized:
            self._n_resized, self._is_ready = pool.n_resized, False
        if not self._is_ready and pool.has_all:
            self._is_ready = self._write_tables()
        return self._is_ready

    def run(self, batch: Batch, is_cancelled: Callable[[], bool] | None = None) -> Logits:
        """Reads one token; logits [1, n_vocab], valid until the next step. Raises EngineAbortedError."""
        logits = self._runner.run(batch, is_cancelled)
        self._told.end_token()
        return logits

    def _write_tables(self) -> bool:
        """Writes where all matrices are; returns whether all experts are there."""
        for index, layer in self._layers.items():
            for expert, (copy, *_) in enumerate(layer.experts):
                found = self._host_pool.place((index, expert), copy)
                if found is None:
                    return False
                repacked = self._repacked.get((index, expert), (None,) * len(found))
                for place, (address, kind) in enumerate(zip(found, copy.slot_class, strict=True)):
                    structure = repacked[place] or (self._structure(kind), address)
                    self._tables[index].write(expert, place, *structure)
        return True

    def _structure(self, kind: MatrixClass) -> NDArray[np.uint8]:
        """The structure of a matrix as it is stored."""
        if kind not in self._structures:
            self._structures[kind] = matrix_structure(kind, self._lookup.buffer)
        return self._structures[kind]

    def close(self) -> None:
        """Frees graphs and tables."""
        self._runner.close()
        self._lookup.close()


class _Told:
    """Tells of what was selected: `uses` of each step, the cache policy of some."""

    def __init__(self, layers: Mapping[int, ExpertLayer], policy: Policy, uses: ExpertUses) -> None:
        self._targets = {index: np.array(layer.target) for index, layer in layers.items()}
        self._policy, self._uses, self._n_steps = policy, uses, 0

    def add(self, layer: int, rows: NDArray[np.int32]) -> None:
        """A token has selected these rows of a layer's router, [1, n_used]."""
        self._uses.add(layer, rows)
        if not self._n_steps % _TOLD_EVERY:
            experts = self._targets[layer][rows[0]]
            self._policy.decode(layer, experts[experts >= 0])

    def end_token(self) -> None:
        """All layers have been told of."""
        if not self._n_steps % _TOLD_EVERY:
            self._policy.end_token()
        self._n_steps += 1
