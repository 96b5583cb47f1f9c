"""What a model asks of a machine for each token: bytes of matrices, by the kernel that multiplies with them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from slimoe.offload.machine.speed import MatrixKernel
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources, WeightSource

Matrices = Mapping[MatrixKernel, float]
"""Bytes by kernel."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes and sums over a model of `n_layer` layers, of which some attend and some have experts.

    `dense`: all matrices that every token is multiplied with, but for the `output`, with which only those are whose
    logits are wanted. `host_expert`: one expert in the copy that the CPU computes, averaged over experts and picks;
    `device_expert`: in the device's copy. `read_bytes`: what is read for an expert that is in no memory.
    """

    n_layer: int
    attention_layers: tuple[int, ...]
    routed_layers: tuple[int, ...]
    n_embd: int
    n_expert: float
    n_used: int
    dense: Matrices
    output: Matrices
    host_expert: Matrices
    device_expert: Matrices
    read_bytes: float

    @property
    def n_routed(self) -> int:
        """Layers that have experts."""
        return len(self.routed_layers)


def workload(
    spec: ModelSpec, sources: ModelSources, layers: Sequence[ExpertLayer | None], low_share: float = 0.0
) -> Workload:
    """A model's load. The CPU takes an expert's last copy, in place of the first, for `low_share` of its picks."""
    routed = [layer for layer in layers if layer]
    best = _mean_expert([copies[0] for layer in routed for copies in layer.experts])
    low = _mean_expert([copies[-1] for layer in routed for copies in layer.experts])
    kernels = dict.fromkeys((*best, *low))
    host = {k: (1 - low_share) * best.get(k, 0.0) + low_share * low.get(k, 0.0) for k in kernels}
    return Workload(
        n_layer=len(layers),
        attention_layers=spec.attention_layers,
        routed_layers=tuple(index for index, layer in enumerate(layers) if layer),
        n_embd=spec.n_embd,
        n_expert=sum(len(layer.experts) for layer in routed) / max(1, len(routed)),
        n_used=max((layer.n_expert_used for layer in routed), default=0),
        dense=_sums(layer_matrices(sources), is_expert=False),
        output=_sums([sources.output.weight], is_expert=False),
        host_expert={kernel: n_bytes for kernel, n_bytes in host.items() if n_bytes},
        device_expert=best,
        read_bytes=sum(host.values()),
    )


def layer_matrices(sources: ModelSources) -> Iterator[WeightSource]:
    """Every matrix of the layers that each token is multiplied with, whatever it is routed to."""
    for layer in sources.layers:
        yield from (linear.weight for linear in (*layer.qkv, layer.attn_output) if linear)
        if layer.router:
            yield layer.router
        elif layer.down:
            yield from (linear.weight for linear in (*layer.gate_up, layer.down))


def expert_matrices(layers: Sequence[ExpertLayer | None]) -> Iterator[WeightSource]:
    """Every matrix of every copy of every expert."""
    for layer in layers:
        for copies in layer.experts if layer else ():
            for copy in copies:
                yield from (copy.gate, copy.up, copy.down)


def _mean_expert(copies: Sequence[ExpertCopy]) -> dict[MatrixKernel, float]:
    parts = [part for copy in copies for part in (copy.gate, copy.up, copy.down)]
    return {kernel: n_bytes / len(copies) for kernel, n_bytes in _sums(parts, is_expert=True).items()}


def _sums(sources: Iterable[WeightSource], is_expert: bool) -> dict[MatrixKernel, float]:
    total: dict[MatrixKernel, float] = {}
    for source in sources:
        kernel = MatrixKernel(source.type, source.ne[0], is_expert)
        total[kernel] = total.get(kernel, 0.0) + source.n_bytes
    return total
