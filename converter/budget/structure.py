"""What of a model is kept, before any type is chosen: a recipe's drops, merges and trims, as layers of a plan.

Types in the layers are placeholders (F32), which `types` and `named_types` replace.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGMLQuantizationType as Type

from slimoe.converter.layout.layer import CHOICE_BIAS, FLOATS, ROUTER, is_attention
from slimoe.converter.layout.plan import ExpertPlan, LayerPlan, Types
from slimoe.converter.methods.constant_experts import constant_costs, constant_vectors
from slimoe.converter.methods.expert_drop import Kept, Survivors, keep_by_layer, keep_overall, redirect, substitute
from slimoe.converter.methods.expert_groups import (
    ExpertGroups,
    joined_groups,
    merge_by_output,
    msmoe,
    msmoe_alike,
    plan_groups,
)
from slimoe.converter.methods.expert_order import co_selection_order
from slimoe.converter.methods.gram_policy import gram_of_block, nats_per_square
from slimoe.converter.methods.merged_routes import RouterRows, keep_rows, merge_rows
from slimoe.converter.methods.naee import best_subset, best_subsets
from slimoe.converter.methods.removal import (
    TOGETHER,
    Removal,
    attention_removals,
    block_removals,
    first,
    layer_removals,
)
from slimoe.converter.methods.scores import SCORES, shares_of_loss
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.model_source import ModelSource, block_key
from slimoe.converter.stats.statistics import RouterSums, Statistics
from slimoe.offload.errors import UsageError
from slimoe.offload.model.tensor_list import layer_tensors

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Structure:
    """The layers that are left, and the KL divergence per token that leaving out the rest is expected to cost.

    That is as far as the statistics say: merges and trims count nothing.
    """

    layers: tuple[LayerPlan, ...]
    kl: float


def build_structure(source: ModelSource, statistics: Statistics | None, recipe: Recipe) -> Structure:
    """Applies a recipe's drops and merges; a width is for `trimmed`, which must see activations.

    Raises UsageError for what cannot be done, and without statistics for whatever needs them.
    """
    if statistics is None:
        drops = recipe.drop_ffn, recipe.drop_attention, recipe.drop_blocks, recipe.experts.keep, recipe.experts.width
        if any(drops) or recipe.free_constants or recipe.free_layers:
            raise UsageError("What to leave out is chosen by statistics. Run slimoe calibrate, and give --stats FILE.")
        return Structure(tuple(whole_layer(source, block) for block in range(source.spec.n_layer)), 0.0)
    return _Builder(source, statistics, recipe).build()


def whole_layer(source: ModelSource, block: int, survivors: Survivors | None = None) -> LayerPlan:
    """A layer with all of its parts, or with these experts; its constants are the source's own."""
    layer = source.layers[block]
    kept = survivors or redirect(layer.target, range(layer.n_stored))
    types_of_experts: Types = (Type.F32,) * len(source.spec.architecture.projections)
    experts = tuple(ExpertPlan((expert,), types_of_experts) for expert in kept.experts)
    roles = (tensor.role for tensor in layer_tensors(source.spec, block) if tensor.role not in FLOATS)
    matrices = [role for role in roles if len(source.shapes.get(block_key(block, role), ())) > 1]
    types = dict.fromkeys(matrices, Type.F32)
    return LayerPlan(block, experts, kept.rows, kept.target, types, layer.has_attention)


def with_order(layer: LayerPlan, router: RouterSums) -> LayerPlan:
    """The layer with experts that are selected together next to each other; the router's rows keep their order."""
    assert not layer.hints, "hints are in the experts' order"
    means = np.zeros((len(layer.experts), len(router.together)), np.int64)
    for row, expert in zip(layer.rows, layer.target, strict=True):
        if expert >= 0:
            means[expert, row] = 1
    order = co_selection_order(means @ router.together @ means.T)
    place = {expert: number for number, expert in enumerate(order)}
    target = tuple(place.get(expert, expert) for expert in layer.target)
    return replace(layer, experts=tuple(layer.experts[expert] for expert in order), target=target)


def without_ffn(layer: LayerPlan) -> LayerPlan:
    """The layer with its attention alone."""
    types = {role: kind for role, kind in layer.types.items() if is_attention(role)}
    return replace(layer, experts=(), rows=(), target=(), router=None, router_biases={}, constants=None, types=types)


def without_attention(layer: LayerPlan) -> LayerPlan:
    """The layer with its feed-forward part alone."""
    types = {role: kind for role, kind in layer.types.items() if not is_attention(role)}
    return replace(layer, has_attention=False, types=types)


def with_constants(source: ModelSource, statistics: Statistics, block: int, kept: Sequence[int]) -> LayerPlan:
    """The layer with constants in place of the experts that are not kept; raises UsageError."""
    survivors = substitute(source.layers[block].target, kept)
    layer = whole_layer(source, block, survivors)
    if not survivors.replaced:
        return layer
    return replace(layer, constants=constant_vectors(statistics.layers[block])[list(survivors.replaced)])


class _Builder:
    """Applies the steps in their order: blocks, feed-forward parts and attentions, experts of what is left."""

    def __init__(self, source: ModelSource, statistics: Statistics, recipe: Recipe) -> None:
        self.source, self.statistics, self.recipe = source, statistics, recipe
        self.kl = 0.0

    def build(self) -> Structure:
        by_block = self._but_one(block_removals(self.statistics, self.source.layers))
        gone = self._chosen(by_block, self.recipe.drop_blocks)
        blocks = [block for block in range(self.source.spec.n_layer) if block not in gone]
        by_ffn = [one for one in layer_removals(self.statistics, self.source.layers) if one.layer in blocks]
        by_attention = [one for one in attention_removals(self.statistics, self.source.layers) if one.layer in blocks]
        ffn = self._chosen(by_ffn, self.recipe.drop_ffn)
        attention = self._chosen(self._but_one(by_attention), self.recipe.drop_attention)
        routed = [block for block in blocks if block not in ffn and self.source.layers[block].target]
        layers = dict(zip(routed, self._experts(routed), strict=True))
        result = []
        for block in blocks:
            layer = layers[block] if block in layers else whole_layer(self.source, block)
            layer = without_ffn(layer) if block in ffn else layer
            result.append(without_attention(layer) if block in attention else layer)
        return Structure(tuple(result), self.kl)

    def _but_one(self, ranking: Sequence[Removal]) -> Sequence[Removal]:
        """The ranking without the last layer that has attention, where others have a recurrence: one always stays."""
        spec = self.source.spec
        attending = [one for one in ranking if not spec.is_recurrent(one.layer)] if spec.recurrent_layers else []
        return [one for one in ranking if one not in attending[-1:]]

    def _chosen(self, ranking: Sequence[Removal], n: int) -> set[int]:
        """Layers of the first `n`, whose cost is added."""
        chosen = first(ranking, n)
        self.kl += TOGETHER * sum(one.nats or 0.0 for one in chosen)
        return {one.layer for one in chosen}

    # --- experts --------------------------------------------------------------------------------------------

    def _experts(self, blocks: Sequence[int]) -> list[LayerPlan]:
        experts = self.recipe.experts
        if experts.keep is None:
            return [whole_layer(self.source, block) for block in blocks]
        if experts.merge is not None:
            n_used = self.source.spec.n_expert_used
            if experts.keep < n_used:
                raise UsageError(f"Merging down to {experts.keep} experts is not possible: a token selects {n_used}.")
            return self._merged(blocks)
        kept = self._kept(blocks, experts.keep)
        for block, one in zip(blocks, kept, strict=True):
            self._count(block, one)
        if experts.replacement == "constant":
            return [
                with_constants(self.source, self.statistics, block, one)
                for block, one in zip(blocks, kept, strict=True)
            ]
        layers = self.source.layers
        return [
            whole_layer(self.source, block, redirect(layers[block].target, one))
            for block, one in zip(blocks, kept, strict=True)
        ]

    def _kept(self, blocks: Sequence[int], n_keep: int) -> Kept:
        experts, layers = self.recipe.experts, [self.statistics.layers[block] for block in blocks]
        targets, n_used = [self.source.layers[block].target for block in blocks], self.source.spec.n_expert_used
        n_group = self.source.spec.experts.n_group if experts.replacement == "nothing" else 1
        if experts.overall and n_group > 1:
            problem = f"The {n_group} groups of which a router selects some first must keep as many experts each"
            raise UsageError(f"{problem}. Leave --overall out, or put constants in the others' place.")
        if experts.score == "subset":
            grams = [gram_of_block(one, self.source, block) for one, block in zip(layers, blocks, strict=True)]
            if not experts.overall:
                return tuple(best_subset(gram, n_keep, n_group=n_group).kept for gram in grams)
            pairs = zip(layers, grams, strict=True)
            return best_subsets([(gram, nats_per_square(one, gram)) for one, gram in pairs], n_keep * len(blocks))
        if experts.score not in SCORES:
            raise UsageError(f"There is no score {experts.score!r}. Choose subset or one of {', '.join(SCORES)}.")
        score = SCORES[experts.score]
        scores = [score(one, target) for one, target in zip(layers, targets, strict=True)]
        if not experts.overall:
            return keep_by_layer(scores, n_keep, n_used, n_group)
        if experts.score != "loss":
            scores = [shares_of_loss(one, layer) for one, layer in zip(scores, layers, strict=True)]
        return keep_overall(scores, n_keep * len(blocks), n_used)

    def _count(self, block: int, kept: Sequence[int]) -> None:
        """Adds what dropping the others of a layer costs."""
        layer = self.statistics.layers[block]
        dropped = set(range(self.source.layers[block].n_stored)) - set(kept)
        if not dropped or layer.removals is None:
            return
        if self.recipe.experts.replacement == "constant":
            self.kl += TOGETHER * float(constant_costs(layer)[list(dropped)].sum())
            return
        gram = gram_of_block(layer, self.source, block)
        error = float(gram.error(gram.redirected(dropped)).mean())
        self.kl += TOGETHER * nats_per_square(layer, gram) * error

    def _merged(self, blocks: Sequence[int]) -> list[LayerPlan]:
        keep, how = self.recipe.experts.keep, self.recipe.experts.merge
        assert keep is not None
        layers = [self.statistics.layers[block] for block in blocks]
        targets, spec = [self.source.layers[block].target for block in blocks], self.source.spec
        # Of a native file's router all rows are left, so that its groups stay as they are.
        n_group = 1 if self.recipe.format == "native" else spec.experts.n_group
        if how == "m-smoe" and self.recipe.format == "native":
            found: Sequence[ExpertGroups] = msmoe(layers, targets, keep * len(blocks), spec.n_expert_used)
        elif how != "hc-smoe":
            # The stock format has as many experts in every layer, and an expert of neurons has room for as many.
            found = msmoe_alike(layers, targets, keep, n_group)
        else:
            outputs = [layer.outputs for layer in layers if layer.outputs is not None]
            if len(outputs) < len(layers):
                raise UsageError(
                    "The statistics have no sums of the experts' outputs. Calibrate again, leaving nothing out."
                )
            found = [merge_by_output(one, keep, n_router_group=n_group) for one in outputs]
        result = []
        for block, groups in zip(blocks, found, strict=True):
            # Neurons that were permuted apart are aligned for M-SMoE and for outputs' clusters alike.
            whole = whole_layer(self.source, block)
            types_of_experts = whole.experts[0].types
            if how == "neurons":
                experts = joined_groups(groups, types_of_experts)
            else:
                experts = plan_groups(self.source, block, groups, [types_of_experts] * len(groups.members))
            result.append(self._routed(replace(whole, experts=experts), groups))
        return result

    def _routed(self, layer: LayerPlan, groups: ExpertGroups) -> LayerPlan:
        """The layer with all rows where the format has aliases; else with one row for each group."""
        block, target = layer.block, self.source.layers[layer.block].target
        if self.recipe.format == "native":
            routes = keep_rows(target, groups)
            return replace(layer, rows=routes.rows, target=routes.target)
        router = self.statistics.layers[block].router
        assert router is not None
        use = router.rank_count.sum(1).astype(np.float64)
        weight = self.source.read(block_key(block, ROUTER))
        # Biases are averaged as the rows that they belong to: as further columns.
        keys = {role: block_key(block, role, "bias") for role in (ROUTER, CHOICE_BIAS)}
        biases = {role: self.source.read(key)[:, None] for role, key in keys.items() if key in self.source.shapes}
        joined = np.hstack([weight, *biases.values()])
        inputs = np.empty((0, joined.shape[1]), np.float32)
        routes = merge_rows(RouterRows(joined, target, use, inputs), groups, "mean")
        assert routes.router is not None
        merged = np.ascontiguousarray(routes.router[:, : weight.shape[1]])
        columns = dict(zip(biases, routes.router[:, weight.shape[1] :].T.copy(), strict=True))
        return replace(layer, rows=routes.rows, target=routes.target, router=merged, router_biases=columns)
