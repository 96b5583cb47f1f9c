"""The work that a model is for each token: bytes of matrices, by the kernel that multiplies with them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from slimoe.offload.machine.speed import MatrixKernel
from slimoe.offload.model.experts import ExpertLayer
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources, WeightSource

Matrices = Mapping[MatrixKernel, float]
"""Bytes by kernel."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes and sums over a model of `n_layer` layers, of which some attend and some have experts.

    `dense` are the matrices that every token is multiplied with, `output` is the one for tokens whose logits are
    wanted, and `expert` is one expert, averaged over all. `read_bytes` is what is read for an expert that is in no
    memory. A token has `n_vocab` logits; experts read and write `n_embd_expert` values of it. `windows` are the tokens
    that each of the attention layers sees at most, 0 for all before it; without any, all layers see all.
    """

    n_layer: int
    attention_layers: tuple[int, ...]
    routed_layers: tuple[int, ...]
    n_embd: int
    n_embd_expert: int
    n_expert: float
    n_used: int
    dense: Matrices
    output: Matrices
    expert: Matrices
    read_bytes: float
    n_vocab: int = 0
    windows: tuple[int, ...] = ()

    @property
    def n_routed(self) -> int:
        """Layers that have experts."""
        return len(self.routed_layers)


def workload(spec: ModelSpec, sources: ModelSources, layers: Sequence[ExpertLayer | None]) -> Workload:
    """A model's workload, with every expert in its best copy."""
    routed = [layer for layer in layers if layer]
    best = [copies[0] for layer in routed for copies in layer.experts]
    parts = [part for copy in best for part in copy.matrices]
    expert = {kernel: n_bytes / len(best) for kernel, n_bytes in _sums(parts, is_expert=True).items()}
    return Workload(
        n_layer=len(layers),
        attention_layers=spec.attention_layers,
        routed_layers=tuple(index for index, layer in enumerate(layers) if layer),
        n_embd=spec.n_embd,
        n_embd_expert=spec.n_embd_expert,
        n_expert=sum(len(layer.experts) for layer in routed) / max(1, len(routed)),
        n_used=max((layer.n_expert_used for layer in routed), default=0),
        dense=_sums(layer_matrices(sources), is_expert=False),
        output=_sums([sources.output.weight], is_expert=False),
        expert=expert,
        read_bytes=sum(expert.values()),
        n_vocab=spec.n_vocab,
        windows=tuple(spec.window(layer) for layer in spec.attention_layers),
    )


def layer_matrices(sources: ModelSources) -> Iterator[WeightSource]:
    """Every matrix of the layers that each token is multiplied with, whatever it is routed to."""
    for layer in sources.layers:
        yield from (linear.weight for linear in layer.matrices)
        if layer.router:
            yield layer.router.weight
        elif layer.down:
            yield from (linear.weight for linear in (*layer.gate_up, layer.down))


def expert_matrices(layers: Sequence[ExpertLayer | None]) -> Iterator[WeightSource]:
    """Every matrix of every copy of every expert."""
    for layer in layers:
        for copies in layer.experts if layer else ():
            for copy in copies:
                yield from copy.matrices


def _sums(sources: Iterable[WeightSource], is_expert: bool) -> dict[MatrixKernel, float]:
    total: dict[MatrixKernel, float] = {}
    for source in sources:
        kernel = MatrixKernel(source.type, source.ne[0], is_expert)
        total[kernel] = total.get(kernel, 0.0) + source.n_bytes
    return total
