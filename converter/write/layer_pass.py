"""What the calibration's tokens meet within one layer of a result, with the matrices that it has so far."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from slimoe.converter.forward.attention_pass import AttentionPass
from slimoe.converter.forward.block import (
    attend,
    read_attention,
    read_dense,
    read_end,
    read_ffn_norm,
    read_latent_space,
    read_router,
    read_shared,
    read_tensor,
)
from slimoe.converter.forward.expert import Expert, SharedExpert
from slimoe.converter.forward.routing import Router, Routing, route
from slimoe.converter.forward.stream import Sequences, rows_by_expert
from slimoe.converter.layout.layer import CHOICE_BIAS, ROUTER
from slimoe.converter.layout.plan import LayerPlan
from slimoe.converter.source.model_source import ModelSource, constant_key


class LayerPass:
    """A stream `h` [n_rows, n_embd] before a layer, and what follows from it there, each computed when it is asked for.

    `values` has the matrices of all but experts, which are those of `expert`; either may change until it is used.
    """

    def __init__(
        self, values: ModelSource, sequences: Sequences, plan: LayerPlan, h: Tensor, expert: Callable[[int], Expert]
    ) -> None:
        self._values, self._sequences, self._plan, self.h, self.expert = values, sequences, plan, h, expert
        self._middle: Tensor | None = None
        self._input: Tensor | None = None
        self._expert_input: Tensor | None = None
        self._routing: Routing | None = None

    def attention_input(self) -> Tensor:
        """What queries, keys and values read."""
        block = read_attention(self._values, self._plan.block)
        assert block is not None
        return block.norm(self.h)

    def attended(self) -> Iterator[AttentionPass]:
        """The passes of the layer's attention over the sequences."""
        block = read_attention(self._values, self._plan.block)
        assert block is not None
        for begin, end in self._sequences.spans():
            yield attend(block, self._values.spec, self.h[begin:end])

    def middle(self) -> Tensor:
        """The stream behind the layer's attention."""
        if self._middle is None:
            self._middle = self.h
            if self._plan.has_attention:
                self._middle = self.h + torch.cat([one.update for one in self.attended()])
        return self._middle

    def input(self) -> Tensor:
        """What the layer's feed-forward part reads."""
        if self._input is None:
            self._input = read_ffn_norm(self._values, self._plan.block)(self.middle())
        return self._input

    def expert_input(self) -> Tensor:
        """What the layer's experts read, which is less than its router does where a matrix is between."""
        if self._expert_input is None:
            space = read_latent_space(self._values, self._plan.block)
            self._expert_input = self.input() if space is None else space.down(self.input())
        return self._expert_input

    def expert_sum(self, router: Router | None = None) -> Tensor:
        """The weighted sums of the layer's experts; `router` selects them if it is not the plan's."""
        x, read = self.input(), self.expert_input()
        routing = self.routing() if router is None else route(router, self._values.spec, x)
        total = torch.zeros_like(read)
        for expert, rows, expert_weights in rows_by_expert(self._plan.target, routing):
            total.index_add_(0, rows, expert_weights[:, None] * self.output(expert, read[rows]))
        return total

    def lifted(self, experts: Tensor) -> Tensor:
        """What is added to the stream for sums of experts, or for single ones [..., n_embd_expert]."""
        space = read_latent_space(self._values, self._plan.block)
        return experts if space is None else space.up(experts)

    def router(self) -> Router:
        """The router as it is in the plan."""
        plan, router = self._plan, read_router(self._values, self._plan.block)
        assert router is not None
        own = router.with_rows(plan.rows)
        biases = {role: torch.from_numpy(values) for role, values in plan.router_biases.items()}
        return replace(
            own,
            weight=own.weight if plan.router is None else torch.from_numpy(plan.router),
            bias=biases.get(ROUTER, own.bias),
            choice_bias=biases.get(CHOICE_BIAS, own.choice_bias),
        )

    def routing(self) -> Routing:
        """The experts that the router selects as it is in the plan."""
        if self._routing is None:
            self._routing = route(self.router(), self._values.spec, self.input())
        return self._routing

    def always(self) -> SharedExpert | None:
        """What every token passes, the shared expert or a dense feed-forward part."""
        plan = self._plan
        of = self._values.spec.architecture.shared
        suffix = of.suffix if of is not None else "_shexp"
        if f"ffn_down{suffix if plan.rows else ''}" not in plan.types:
            return None
        shared = read_shared(self._values, plan.block) if plan.rows else None
        return SharedExpert(read_dense(self._values, plan.block)[1]) if shared is None else shared

    def output(self, expert: int, x: Tensor) -> Tensor:
        """What a stored expert, or the constant of number -1 - `expert`, answers to inputs `x` [n, n_embd_expert]."""
        if expert >= 0:
            return self.expert(expert)(x)
        constants = self._plan.constants
        vector = (
            torch.from_numpy(constants[-1 - expert])
            if constants is not None
            else read_tensor(self._values, constant_key(self._plan.block, -1 - expert))
        )
        return vector.expand(len(x), -1)

    def behind(self, router: Router | None = None) -> Tensor:
        """The stream behind the layer; `router` selects the experts if it is not the plan's."""
        update, end = None, read_end(self._values, self._plan.block)
        if self._plan.rows:
            update = self.lifted(self.expert_sum(router))
        always, middle = self.always(), self.middle()
        if end is not None:
            passed = None if always is None else always(self.input())
            return end.scaled(middle) if update is None else end.after(middle, update, passed)
        if always is not None:
            output = always(self.input())
            update = output if update is None else update + output
        return middle if update is None else middle + self._values.spec.multipliers.residual * update
