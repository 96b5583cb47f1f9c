"""Builds the graphs of a step that is cut at routers whose experts are not all at hand.

A segment begins with the token rows, or with the sum of the experts' outputs of the layer where the one before ended.
It ends at the next cut layer's router, at the last layer of a backend, or with the logits. Everything between is
`StepBuilder`'s, in llama.cpp's order, so that the cut changes no bit. The last operation of a cut layer also asks the
routers of the next layers what they would choose for this layer's input, since most of a model changes its mind little
from layer to layer.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.attention import StepInputs, StepShape
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.expert_ffn import add_expert_sum
from slimoe.offload.graph.kv_cache import KVCache
from slimoe.offload.graph.router import add_router
from slimoe.offload.graph.step import StepBuilder
from slimoe.offload.graph.weights import ModelWeights
from slimoe.offload.model.spec import ModelSpec

End = Literal["router", "hidden", "logits"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers `first` to `last`, on the backend number `part`; `first` is `last` + 1 where there is none.

    It begins with the sum of layer `summed`'s experts or, where that is -1, with the tokens or what another backend
    handed over. It ends with the router of layer `last`, with that layer's whole output, or with the logits.
    `ahead` are layers whose routers are asked early.
    """

    part: int
    summed: int
    first: int
    last: int
    end: End
    ahead: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SegmentGraph:
    """A built graph; `logits` is 0 but in the last segment: F32 [n_vocab, n_out]."""

    ctx: int
    graph: int
    logits: int


def cut_into_segments(parts: Sequence[Sequence[int]], cut_layers: Collection[int], n_ahead: int) -> tuple[Segment, ...]:
    """The segments of a step.

    `parts` are the consecutive layers of each backend, none for one that only looks tokens up, `cut_layers` those whose
    experts are not all in a graph; each segment asks the routers of the next `n_ahead` of them on its backend.
    """
    return tuple(
        segment
        for part, layers in enumerate(parts)
        for segment in _segments(part, layers, cut_layers, n_ahead, "logits" if part == len(parts) - 1 else "hidden")
    )


def _segments(
    part: int, layers: Sequence[int], cut_layers: Collection[int], n_ahead: int, end: End
) -> Iterator[Segment]:
    own = [layer for layer in layers if layer in cut_layers]
    summed, first, last = -1, *((layers[0], layers[-1]) if layers else (0, -1))
    for index, layer in enumerate(own):
        yield Segment(part, summed, first, layer, "router", tuple(own[index + 1 : index + 1 + n_ahead]))
        summed, first = layer, layer + 1
    yield Segment(part, summed, first, last, end)


class SegmentBuilder(StepBuilder):
    """Builds one segment of a step."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        cache: KVCache | None,
        shape: StepShape,
        exchange: Exchange,
        segment: Segment,
    ) -> None:
        self.exchange, self.segment, self._has_cache = exchange, segment, cache is not None
        super().__init__(spec, weights, cache, shape)

    def _inputs(self) -> StepInputs:
        n_tokens, n_kv = self.shape.n_tokens, self.shape.n_kv
        return StepInputs(
            tokens=self._vector("tokens", n_tokens),
            positions=self._vector("positions", n_tokens),
            cells=self._vector("cells", n_tokens),
            mask=self.exchange.view(self.ctx, "mask", (n_kv, n_tokens)) if self._has_cache else 0,
        )

    def _n_layers(self) -> int:
        return 1 + self.segment.last - self.segment.first

    def _vector(self, name: str, n: int) -> int:
        return int(ggml.ggml_view_1d(self.ctx, self.exchange.tensor(name), n, 0))

    def build_segment(self) -> SegmentGraph:
        """The graph of the segment."""
        segment, hidden = self.segment, self._first()
        for index in range(segment.first, segment.last + 1):
            hidden = self._attend(index, hidden)
            if index < segment.last or segment.end != "router":
                hidden = self._feed_forward(index, hidden)
        if segment.end == "logits":
            return SegmentGraph(self.ctx, self.graph, self._logits(hidden))
        if segment.end == "router":
            self._choose(segment, hidden)
        else:
            self._hand_out(hidden, "residual", (self.spec.n_embd, self.shape.n_tokens))
        return SegmentGraph(self.ctx, self.graph, 0)

    def _first(self) -> int:
        if self.segment.summed >= 0:
            return self._combined(self.segment.summed)
        if self.segment.part == 0:
            return self._embedded()
        residual = self.exchange.view(self.ctx, "residual", (self.spec.n_embd, self.shape.n_tokens))
        if self.spec.layer_shape(self.segment.first).has_attention:
            return residual
        # Without attention, rows of it would be handed out over themselves: they must lie elsewhere.
        return int(ggml.ggml_scale(self.ctx, residual, 1.0))

    def _embedded(self) -> int:
        return int(ggml.ggml_get_rows(self.ctx, self.weights.token_embd, self.inputs.tokens))

    def _combined(self, index: int) -> int:
        """The sum of a layer's expert outputs and its residual."""
        spec, n_rows = self.spec, self._n_rows(index)
        row_bytes = 4 * spec.n_embd
        outputs = ggml.ggml_view_3d(
            self.ctx,
            self.exchange.tensor("outputs"),
            spec.n_embd,
            spec.n_expert_used,
            n_rows,
            row_bytes,
            row_bytes * spec.n_expert_used,
            0,
        )
        return add_expert_sum(self.ctx, outputs, self.exchange.view(self.ctx, "residual", (spec.n_embd, n_rows)))

    def _choose(self, segment: Segment, hidden: int) -> None:
        """Hands out the residual, the experts' input and the router's choice."""
        spec, n_rows = self.spec, self._n_rows(segment.last)
        layer = self.weights.layers[segment.last]
        plain = ggml.ggml_rms_norm(self.ctx, hidden, spec.rms_eps)
        normed = int(ggml.ggml_mul(self.ctx, plain, layer.ffn_norm))
        ranked, shares = add_router(self.ctx, spec, layer.router, normed)
        n_expert = int(ggml.tensor_at(ranked).ne[0])
        self._hand_out(hidden, "residual", (spec.n_embd, n_rows))
        self._hand_out(normed, "normed", (spec.n_embd, n_rows))
        self._hand_out(shares, "shares", (spec.n_expert_used, n_rows))
        self._hand_out(ranked, "ranked", (n_expert, n_rows))
        if n_rows == 1:
            self._look_ahead(segment, int(plain))

    def _look_ahead(self, segment: Segment, plain: int) -> None:
        """What the next routers say to this layer's input, one row of `n_expert` each in `ahead`."""
        stride = 4 * self.spec.n_expert
        for row, index in enumerate(segment.ahead):
            layer = self.weights.layers[index]
            logits = ggml.ggml_mul_mat(self.ctx, layer.router, ggml.ggml_mul(self.ctx, plain, layer.ffn_norm))
            n_expert = int(ggml.tensor_at(logits).ne[0])
            target = ggml.ggml_view_1d(self.ctx, self.exchange.tensor("ahead"), n_expert, row * stride)
            flat = ggml.ggml_reshape_1d(self.ctx, logits, n_expert)
            ggml.ggml_build_forward_expand(self.graph, ggml.ggml_cpy(self.ctx, flat, target))

    def _hand_out(self, tensor: int, name: str, ne: tuple[int, int]) -> None:
        target = self.exchange.view(self.ctx, name, ne)
        shaped = ggml.ggml_reshape_2d(self.ctx, tensor, *ne)
        ggml.ggml_build_forward_expand(self.graph, ggml.ggml_cpy(self.ctx, shaped, target))
