"""Layers that keep a state of fixed size of what they have read: short convolutions, delta nets and Mamba-2.

Their operations are in llama.cpp's order. A state is two tensors, the last inputs of a convolution and the matrices of
a delta net or of Mamba-2, each in rows of `n_parts` a state. A step reads the states that its sequences had, and writes
others, so that those from before it stay as they are. Of several sequences the graph looks the states up by their
numbers. Of one sequence in host memory it has views of them, which are moved before each step: looking up would copy
what is read once more, and write more slowly than a plain copy.
"""

import math
from dataclasses import dataclass

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.struct import Tensor, tensor_at
from slimoe.offload.graph.attention import StepInputs, StepShape
from slimoe.offload.graph.batch import Batch
from slimoe.offload.graph.linear import MOST_PARTS, add_linear, add_rms_norm
from slimoe.offload.graph.weights import LayerWeights, RecurrentWeights
from slimoe.offload.memory.kv_cache import KVTensors
from slimoe.offload.model.recurrent_spec import RecurrentSpec
from slimoe.offload.model.spec import ModelSpec


class StateViews:
    """The views of states in the graph of a step of one sequence, in host memory."""

    def __init__(self) -> None:
        self._before = list[tuple[Tensor, int, int]]()
        self._after = list[tuple[Tensor, int, int]]()

    def add_before(self, view: int, states: int, n_bytes: int) -> int:
        """Remembers a view of the first of `states`, of `n_bytes` each, that is to show the sequence's state."""
        self._before.append((tensor_at(view), ggml.ggml_get_data(states), n_bytes))
        return view

    def add_after(self, view: int, states: int, n_bytes: int) -> int:
        """Remembers a view of the first of `states`, of `n_bytes` each, to which the state after the step goes."""
        self._after.append((tensor_at(view), ggml.ggml_get_data(states), n_bytes))
        return view

    def move(self, batch: Batch) -> None:
        """Points the views, which must be allocated, at the states before and after a step."""
        if not self._after:
            return
        ((before, after),) = batch.states
        for views, number in ((self._before, before), (self._after, after)):
            for view, base, n_bytes in views:
                view.data = base + number * n_bytes


@dataclass(frozen=True, slots=True)
class RecurrentBuilder:
    """Adds recurrent layers to the graph of a step; the tokens of each sequence are neighbours, in order.

    With `views` the step is of one sequence, and states are moved, not looked up.
    """

    ctx: int
    graph: int
    spec: ModelSpec
    recurrent: RecurrentSpec
    cache: KVTensors
    shape: StepShape
    inputs: StepInputs
    views: StateViews | None
    on_cpu: bool

    def add(self, index: int, layer: LayerWeights, hidden: int) -> int:
        """The output of layer `index`, [n_embd, n_tokens], for its normalised input."""
        assert layer.recurrent is not None
        add = {"short_conv": self._add_short_conv, "delta_net": self._add_delta_net, "mamba2": self._add_mamba2}
        return add[self.recurrent.kind](index, layer.recurrent, hidden)

    @property
    def _n_tokens(self) -> int:
        """Tokens of each sequence."""
        return self.shape.n_tokens // self.shape.n_runs

    def _read(self, states: int, *ne: int) -> int:
        """The states that the sequences had, F32 of the shape `ne`, the last of which are the sequences."""
        if self.views is None:
            rows = ggml.ggml_get_rows(self.ctx, states, self.inputs.states_from)
            return int(ggml.ggml_reshape_4d(self.ctx, rows, *ne, *[1] * (4 - len(ne))))
        return self.views.add_before(self._first_state(states, *ne), states, 4 * math.prod(ne))

    def _first_state(self, states: int, *ne: int) -> int:
        """A view of the first state, of the shape `ne`."""
        sizes = [*ne, *[1] * (4 - len(ne))]
        strides = (4 * math.prod(sizes[:n]) for n in range(1, 4))
        return int(ggml.ggml_view_4d(self.ctx, states, *sizes, *strides, 0))

    def _write(self, states: int, values: int) -> None:
        """Writes the states that the sequences have after the step."""
        width, n_rows = ggml.tensor_at(states).ne[0], self.shape.n_runs * self.recurrent.n_parts
        if self.views is None:
            rows = ggml.ggml_reshape_2d(self.ctx, values, width, n_rows)
            stored = int(ggml.ggml_set_rows(self.ctx, states, rows, self.inputs.states_to))
        else:
            stored = int(ggml.ggml_cpy(self.ctx, values, self._first_state(states, width * n_rows)))
            self.views.add_after(stored, states, 4 * width * n_rows)
        ggml.ggml_build_forward_expand(self.graph, stored)

    def _with_past(self, index: int, columns: int) -> int:
        """The convolution's inputs [n_kept + n_tokens, n_channels, n_runs], of which it keeps the last.

        `columns` are those of this step, [n_channels, n_tokens, n_runs].
        """
        ctx, n_kept, n_channels = self.ctx, self.recurrent.n_conv - 1, self.recurrent.n_channels
        states, n_runs = self.cache.convs[index], self.shape.n_runs
        # ggml's CPU gives all that lies along the first two axes to one thread: channels lie along the third as well.
        n_parts = math.gcd(n_channels, MOST_PARTS) if self.on_cpu else 1
        width, (by_token, by_run) = n_channels // n_parts, ggml.tensor_at(columns).nb[1:3]
        past = self._read(states, n_kept, width, n_parts, n_runs)
        of_part = width, self._n_tokens, n_parts, n_runs
        parts = ggml.ggml_view_4d(ctx, columns, *of_part, by_token, 4 * width, by_run, 0)
        every = ggml.ggml_concat(ctx, past, ggml.ggml_permute(ctx, parts, 1, 0, 2, 3), 0)
        every = ggml.ggml_reshape_3d(ctx, every, n_kept + self._n_tokens, n_channels, n_runs)
        strides, n_bytes = ggml.tensor_at(every).nb, 4 * self._n_tokens
        last = ggml.ggml_view_3d(ctx, every, n_kept, n_channels, n_runs, strides[1], strides[2], n_bytes)
        self._write(states, int(last if self.views else ggml.ggml_cont(ctx, last)))
        return int(every)

    def _add_short_conv(self, index: int, weights: RecurrentWeights, hidden: int) -> int:
        ctx, width, shape = self.ctx, self.spec.n_embd, (self._n_tokens, self.shape.n_runs)
        both = add_linear(ctx, weights.inputs[0], ggml.ggml_reshape_3d(ctx, hidden, width, *shape))
        strides = ggml.tensor_at(both).nb[1:3]
        before, after, values = (
            ggml.ggml_view_3d(ctx, both, width, *shape, *strides, 4 * width * part) for part in range(3)
        )
        inputs = self._with_past(index, ggml.ggml_mul(ctx, before, values))
        gated = ggml.ggml_mul(ctx, after, ggml.ggml_ssm_conv(ctx, inputs, weights.conv))
        output = add_linear(ctx, weights.output, gated)
        return int(ggml.ggml_reshape_2d(ctx, output, width, self.shape.n_tokens))

    def _add_delta_net(self, index: int, weights: RecurrentWeights, hidden: int) -> int:
        ctx, of, n_tokens, n_runs = self.ctx, self.recurrent, self._n_tokens, self.shape.n_runs
        columns = add_linear(ctx, weights.inputs[0], hidden)
        columns = int(ggml.ggml_reshape_3d(ctx, columns, of.n_channels, n_tokens, n_runs))
        gate = add_linear(ctx, weights.inputs[1], hidden)
        beta, alpha = self._beta_and_alpha(weights, hidden)
        softplus = ggml.ggml_softplus(ctx, ggml.ggml_add(ctx, alpha, weights.step_bias))
        decay = ggml.ggml_reshape_4d(ctx, ggml.ggml_mul(ctx, softplus, weights.decay), 1, of.n_rank, n_tokens, n_runs)
        mixed = ggml.ggml_silu(ctx, ggml.ggml_ssm_conv(ctx, self._with_past(index, columns), weights.conv))
        parts = self._queries_keys_values(int(mixed))
        states = self.cache.matrices[index]
        before = self._read(states, of.n_state, of.n_state, of.n_rank, n_runs)
        result = ggml.ggml_gated_delta_net(ctx, *parts, decay, beta, before, 1)
        n_bytes, n_values = 4 * of.n_state, n_tokens * n_runs
        strides = (n_bytes, n_bytes * of.n_rank, n_bytes * of.n_rank * n_tokens)
        output = ggml.ggml_view_4d(ctx, result, of.n_state, of.n_rank, n_tokens, n_runs, *strides, 0)
        after = ggml.ggml_view_1d(ctx, result, of.n_matrix_kept * n_runs, n_bytes * of.n_rank * n_values)
        self._write(states, after)
        gate = int(ggml.ggml_reshape_4d(ctx, gate, of.n_state, of.n_rank, n_tokens, n_runs))
        normed = add_rms_norm(ctx, int(output), weights.norm, self.spec.rms_eps)
        gated = ggml.ggml_mul(ctx, normed, ggml.ggml_silu(ctx, gate))
        return add_linear(ctx, weights.output, int(ggml.ggml_reshape_2d(ctx, gated, of.n_inner, self.shape.n_tokens)))

    def _add_mamba2(self, index: int, weights: RecurrentWeights, hidden: int) -> int:
        ctx, of, n_tokens, n_runs = self.ctx, self.recurrent, self._n_tokens, self.shape.n_runs
        n_head_values, shape = of.n_inner // of.n_rank, (n_tokens, n_runs)
        every = add_linear(ctx, weights.inputs[0], hidden)
        every = int(ggml.ggml_reshape_3d(ctx, every, ggml.tensor_at(every).ne[0], *shape))
        strides = ggml.tensor_at(every).nb[1:3]
        gate = ggml.ggml_view_4d(ctx, every, n_head_values, of.n_rank, *shape, 4 * n_head_values, *strides, 0)
        columns = ggml.ggml_view_3d(ctx, every, of.n_channels, *shape, *strides, 4 * of.n_inner)
        steps = ggml.ggml_view_3d(ctx, every, of.n_rank, *shape, *strides, 4 * (of.n_inner + of.n_channels))
        mixed = ggml.ggml_ssm_conv(ctx, self._with_past(index, int(columns)), weights.conv)
        mixed = int(ggml.ggml_silu(ctx, ggml.ggml_add(ctx, mixed, weights.conv_bias)))
        values, keys, queries = (
            self._heads(mixed, *part)
            for part in (
                (n_head_values, of.n_rank, 0),
                (of.n_state, of.n_group, of.n_inner),
                (of.n_state, of.n_group, of.n_inner + of.n_group * of.n_state),
            )
        )
        steps = ggml.ggml_add(ctx, ggml.ggml_cont(ctx, steps), weights.step_bias)
        states = self.cache.matrices[index]
        n_states = ggml.tensor_at(states).ne[1] // of.n_parts
        before = ggml.ggml_reshape_4d(ctx, states, of.n_state, n_head_values, of.n_rank, n_states)
        parts = before, values, steps, weights.decay, keys, queries, self.inputs.states_read
        result = ggml.ggml_ssm_scan(ctx, *parts, 1)
        n_read = of.n_inner * self.shape.n_tokens
        self._write(states, ggml.ggml_view_1d(ctx, result, of.n_matrix_kept * n_runs, 4 * n_read))
        strides = (4 * n_head_values, 4 * of.n_inner, 4 * of.n_inner * n_tokens)
        output = ggml.ggml_view_4d(ctx, result, n_head_values, of.n_rank, *shape, *strides, 0)
        output = ggml.ggml_add(ctx, output, self._skipped(values, weights.skip))
        gated = ggml.ggml_swiglu_split(ctx, ggml.ggml_cont(ctx, gate), output)
        grouped = int(ggml.ggml_reshape_4d(ctx, gated, of.n_inner // of.n_group, of.n_group, *shape))
        normed = add_rms_norm(ctx, grouped, weights.norm, self.spec.rms_eps)
        return add_linear(ctx, weights.output, int(ggml.ggml_reshape_2d(ctx, normed, of.n_inner, self.shape.n_tokens)))

    def _skipped(self, values: int, skip: int) -> int:
        """What goes past Mamba-2's states: the values [width, n_rank, n_tokens, n_runs], times `skip` [1, n_rank]."""
        if not self.on_cpu:
            return int(ggml.ggml_mul(self.ctx, values, skip))
        # As in `add_factors`; the tokens of all runs lie one behind the other.
        tensor, n_tokens = ggml.tensor_at(values), self.shape.n_tokens
        width, n_rank = tensor.ne[:2]
        by_head, by_token = tensor.nb[1:3]
        rows = ggml.ggml_view_4d(self.ctx, values, width, 1, n_rank, n_tokens, by_head, by_head, by_token, 0)
        each = ggml.ggml_repeat_4d(self.ctx, ggml.ggml_reshape_3d(self.ctx, skip, 1, 1, n_rank), 1, 1, n_rank, n_tokens)
        product = ggml.ggml_out_prod(self.ctx, rows, each)
        return int(ggml.ggml_reshape_4d(self.ctx, product, *tensor.ne))

    def _heads(self, mixed: int, width: int, count: int, begin: int) -> int:
        """Heads [width, count, n_tokens, n_runs] of the convolution's outputs from channel `begin` on."""
        strides, shape = ggml.tensor_at(mixed).nb[1:3], (self._n_tokens, self.shape.n_runs)
        return int(ggml.ggml_view_4d(self.ctx, mixed, width, count, *shape, 4 * width, *strides, 4 * begin))

    def _beta_and_alpha(self, weights: RecurrentWeights, hidden: int) -> tuple[int, int]:
        """How much of a value is taken in [1, n_rank, n_tokens, n_runs], and what decay depends on [n_rank, ...]."""
        ctx, of, n_tokens, n_runs = self.ctx, self.recurrent, self._n_tokens, self.shape.n_runs
        if not self.spec.architecture.groups_heads:
            beta, alpha = (add_linear(ctx, one, hidden) for one in weights.inputs[2:])
        else:
            each = of.n_rank // of.n_group
            both = add_linear(ctx, weights.inputs[2], hidden)
            both = int(ggml.ggml_reshape_4d(ctx, both, 2 * each, of.n_group, n_tokens, n_runs))
            shape, strides = (each, of.n_group, n_tokens, n_runs), ggml.tensor_at(both).nb[1:4]
            beta, alpha = (
                int(ggml.ggml_cont(ctx, ggml.ggml_view_4d(ctx, both, *shape, *strides, 4 * each * part)))
                for part in range(2)
            )
        beta = int(ggml.ggml_reshape_4d(ctx, beta, 1, of.n_rank, n_tokens, n_runs))
        return int(ggml.ggml_sigmoid(ctx, beta)), int(ggml.ggml_reshape_3d(ctx, alpha, of.n_rank, n_tokens, n_runs))

    def _queries_keys_values(self, mixed: int) -> tuple[int, int, int]:
        """Queries and keys of length 1 [n_state, n_group, ...], and values [n_state, n_rank, n_tokens, n_runs].

        Where value heads of one key head are neighbours, queries and keys are repeated for each of them: the operation
        itself gives value head i the key head i modulo their number.
        """
        of = self.recurrent
        counts, parts, begin = (of.n_group, of.n_group, of.n_rank), list[int](), 0
        for count in counts:
            parts.append(self._heads(mixed, of.n_state, count, begin))
            begin += of.n_state * count
        query, key, value = parts
        query, key = self._unit(query), self._unit(key)
        if self.spec.architecture.groups_heads and of.n_group != of.n_rank:
            query, key = self._repeated(query), self._repeated(key)
        return query, key, value

    def _unit(self, heads: int) -> int:
        """Heads scaled to length 1, by way of their mean square, as llama.cpp does."""
        n_state = self.recurrent.n_state
        normed = ggml.ggml_rms_norm(self.ctx, heads, self.spec.rms_eps / n_state)
        return int(ggml.ggml_scale(self.ctx, normed, 1.0 / n_state**0.5))

    def _repeated(self, heads: int) -> int:
        """Each key head as often as there are value heads of it, one behind the other."""
        ctx, of, n = self.ctx, self.recurrent, self.shape.n_tokens
        apart = ggml.ggml_reshape_4d(ctx, heads, of.n_state, 1, of.n_group, n)
        each = ggml.ggml_repeat_4d(ctx, apart, of.n_state, of.n_rank // of.n_group, of.n_group, n)
        return int(ggml.ggml_reshape_4d(ctx, each, of.n_state, of.n_rank, self._n_tokens, self.shape.n_runs))
