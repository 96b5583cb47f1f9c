"""The experts of a model and the shapes of its layers, and the GGUF keys that they are stored under."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import Value
from slimoe.offload.gguf.metadata_keys import AGAIN, MetadataKeys
from slimoe.offload.model.architecture import SCORES, Architecture, Router, Score

NATIVE_VERSION = 1
"""The newest native format that is read, and the one that is written."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's router rows, and the width of its widest expert, or of its dense feed-forward part where it has no
    router; the width is 0 in a layer without a feed-forward part.

    In a layer without attention the residual stream reaches the feed-forward part unchanged.
    """

    n_expert: int
    n_ff: int
    has_attention: bool = True


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """Routing: a token selects `n_expert_used` of `n_expert` experts, by `score` and, where the model has it, a bias.

    Their weights are scaled to a sum of 1 if `renormalise`, and then multiplied by `weights_scale`; None, as for
    `score`, is the architecture's own way. Experts stand in `n_group` groups, of which a token selects `n_group_used`
    first. `n_ff_shared` is the width of the shared expert, 0 without one. With 0 experts the model is dense. `layers`
    has every layer's shape, and is empty where all layers are alike. Where experts read and write fewer values than the
    residual stream has, between projections, `n_latent` are these; 0 is for none.

    With compressed experts (native files only) the router selects `n_selected` experts, of which the first
    `n_expert_used` are computed, the main ones, and vectors stand for the others; 0 is for none of these. Where weights
    are scaled to a sum of 1, it is the sum of the main experts' weights.
    """

    n_expert: int = 0
    n_expert_used: int = 0
    weights_scale: float = 1.0
    layers: tuple[LayerShape, ...] = ()
    score: Score | None = None
    renormalise: bool | None = None
    n_group: int = 1
    n_group_used: int = 1
    n_ff_shared: int = 0
    n_selected: int = 0
    n_latent: int = 0


def read_experts(
    keys: MetadataKeys, architecture: Architecture, n_layer: int, n_vocab: int, *, is_native: bool
) -> tuple[ExpertSpec, int]:
    """The experts, and the width of the widest one or of a dense model's feed-forward part.

    Raises ModelFileError for missing or contradictory values, UnsupportedModelError for a score that is unknown.
    """
    layers = _native_shapes(keys, n_layer, may_be_dense=architecture.has_dense_layers) if is_native else ()
    least = 0 if architecture.may_be_dense else None
    counts = [shape.n_expert for shape in layers if shape.n_expert] or [keys.count("expert_count", least)]
    n_used = keys.count("expert_used_count", 0)
    if n_used > min(counts) or (min(counts) and not n_used):
        raise ModelFileError(keys.gguf.path, f"it uses {n_used} of {min(counts)} experts per token.", AGAIN)
    n_selected = keys.count("expert_selected_count", 0) if is_native else 0
    if n_selected and not n_used < n_selected <= min(counts):
        problem = f"it computes {n_used} of {n_selected} selected experts, which are of {min(counts)}."
        raise ModelFileError(keys.gguf.path, problem, AGAIN)
    if layers:
        width = max(shape.n_ff for shape in layers if shape.n_expert)
    elif architecture.width_key == "feed_forward_length" or keys.has(architecture.width_key):
        width = keys.count(architecture.width_key)
    else:
        width = keys.count("feed_forward_length") // n_used
    if architecture.has_single_parts and not is_native:
        layers = _single_parts(keys, n_layer, counts[0], width)
    elif architecture.has_dense_layers and not is_native:
        layers = _shapes_with_dense(keys, n_layer, counts[0], width)
    n_group, n_group_used = _groups(keys, min(counts), n_selected or n_used)
    renormalise, score = architecture.router.renormalise, _score(keys, architecture.router, (n_layer, n_vocab))
    spec = ExpertSpec(
        n_expert=max(counts),
        n_expert_used=n_used,
        weights_scale=keys.number("expert_weights_scale", 1.0),
        layers=layers,
        score=score if architecture.router.reads_score else None,
        renormalise=keys.flag("expert_weights_norm", default=False) if renormalise is None else None,
        n_group=n_group,
        n_group_used=n_group_used,
        n_ff_shared=_shared_width(keys, architecture, width, is_native=is_native) if max(counts) else 0,
        n_selected=n_selected,
        n_latent=keys.count("moe_latent_size", 0) if architecture.has_latent_experts else 0,
    )
    return spec, width


def _native_shapes(keys: MetadataKeys, n_layer: int, *, may_be_dense: bool) -> tuple[LayerShape, ...]:
    """What a native file says of each layer; refuses a format that is newer than this program."""
    version = keys.count("format.version")
    if version > NATIVE_VERSION:
        problem = f"the file is of format version {version}, but this program reads versions up to {NATIVE_VERSION}."
        raise UnsupportedModelError(keys.gguf.path, problem, "Update slimoe, or convert the model again.")
    counts = keys.integers("expert_count", n_layer), keys.integers("feed_forward_length", n_layer)
    present = keys.integers("attention.present", n_layer) if keys.has("attention.present") else (1,) * n_layer
    if max(present) > 1:
        raise keys.bad_entry("attention.present", np.asarray(present), int(np.argmax(present)))
    if not any(present):
        raise ModelFileError(keys.gguf.path, "no layer has attention.", AGAIN)
    layers = tuple(LayerShape(*shape) for shape in zip(*counts, map(bool, present), strict=True))
    for layer, shape in enumerate(layers):
        if bool(shape.n_expert) != bool(shape.n_ff) and not (may_be_dense and shape.n_ff):
            problem = f"layer {layer} has {shape.n_expert} experts of width {shape.n_ff}."
            raise ModelFileError(keys.gguf.path, problem, AGAIN)
    if not any(shape.n_expert for shape in layers):
        raise ModelFileError(keys.gguf.path, "no layer has experts.", AGAIN)
    return layers


def _shapes_with_dense(keys: MetadataKeys, n_layer: int, n_expert: int, n_ff: int) -> tuple[LayerShape, ...]:
    """Layers of which the first are dense, and of the others all but every n-th; empty where none is."""
    n_leading, step = keys.count("leading_dense_block_count", 0), keys.count("interleave_moe_layer_step", 1)
    routed = [layer >= n_leading and (layer + 1) % step == 0 for layer in range(n_layer)]
    if all(routed):
        return ()
    if not any(routed):
        problem = f"leading_dense_block_count is {n_leading}, which leaves none of {n_layer} layers with experts."
        raise ModelFileError(keys.gguf.path, problem, AGAIN)
    dense = LayerShape(0, keys.count("feed_forward_length"))
    return tuple(LayerShape(n_expert, n_ff) if is_routed else dense for is_routed in routed)


def _single_parts(keys: MetadataKeys, n_layer: int, n_expert: int, n_ff: int) -> tuple[LayerShape, ...]:
    """Layers that are experts alone, and others without a feed-forward part."""
    name, n_block = "feed_forward_length", keys.count("block_count")
    lengths = keys.integers(name, n_block) if keys.is_array(name) else (keys.count(name),) * n_block
    layers = tuple(LayerShape(n_expert, n_ff, False) if n else LayerShape(0, 0) for n in lengths[:n_layer])
    for what, is_there in (("experts", any(lengths[:n_layer])), ("attention", not all(lengths[:n_layer]))):
        if not is_there:
            raise ModelFileError(keys.gguf.path, f"no layer has {what}, by {keys.prefix}{name}.", AGAIN)
    return layers


def dense_layer_keys(shapes: Sequence[LayerShape]) -> tuple[int, int] | None:
    """`leading_dense_block_count` and `interleave_moe_layer_step` of such layers; None if no such keys say it."""
    routed = [shape.n_expert > 0 for shape in shapes]
    first = routed.index(True) if any(routed) else len(routed)
    for step in range(1, len(routed) + 1):
        if routed == [layer >= first and (layer + 1) % step == 0 for layer in range(len(routed))]:
            return first, step
    return None


def _groups(keys: MetadataKeys, n_expert: int, n_used: int) -> tuple[int, int]:
    n_group = keys.count("expert_group_count", 0)
    if n_group < 2:
        return 1, 1
    n_group_used = keys.count("expert_group_used_count")
    fits = n_expert % n_group == 0 and n_group_used < n_group and n_used <= n_expert // n_group * n_group_used
    if not fits or n_expert // n_group < 2:
        problem = f"{n_expert} experts in {n_group} groups, of which {n_group_used} are used, cannot give {n_used}."
        raise ModelFileError(keys.gguf.path, problem, AGAIN)
    return n_group, n_group_used


def _score(keys: MetadataKeys, router: Router, sizes: tuple[int, int]) -> Score | None:
    stored = keys.count("expert_gating_func", 0)
    if stored and stored not in SCORES:
        known = ", ".join(f"{number} ({name})" for number, name in SCORES.items())
        problem = f"expert_gating_func is {stored}, a router score that is not known; only {known} are."
        raise UnsupportedModelError(keys.gguf.path, problem)
    if not stored and sizes in router.sigmoid_sizes:
        return "sigmoid"
    return SCORES[stored] if stored else None


def _shared_width(keys: MetadataKeys, architecture: Architecture, n_ff: int, *, is_native: bool) -> int:
    shared = architecture.shared
    if shared is None:
        return 0
    stored = keys.count("expert_shared_feed_forward_length", 0)
    if shared.width == "key" or is_native:
        return stored
    if shared.width == "dense":
        return keys.count("feed_forward_length")
    if shared.width == "key_or_dense":
        return stored or keys.count("feed_forward_length")
    one = stored if stored and shared.width == "key_counted" else n_ff
    return one * keys.count("expert_shared_count", 0)


def expert_metadata(
    spec: ExpertSpec, n_ff: int, architecture: Architecture, shapes: Sequence[LayerShape], *, is_native: bool
) -> dict[str, Value]:
    """The keys and values that `read_experts` reads, without prefix; `shapes` are those of all layers."""
    dense = [shape.n_ff for shape in shapes if not shape.n_expert]
    values: dict[str, Value] = {"expert_count": spec.n_expert, "expert_used_count": spec.n_expert_used}
    if spec.weights_scale != 1.0:
        values["expert_weights_scale"] = spec.weights_scale
    if spec.score is not None:
        values["expert_gating_func"] = next(number for number, name in SCORES.items() if name == spec.score)
    if spec.renormalise is not None:
        values["expert_weights_norm"] = spec.renormalise
    if spec.n_group > 1:
        values |= {"expert_group_count": spec.n_group, "expert_group_used_count": spec.n_group_used}
    if spec.n_ff_shared:
        values["expert_shared_feed_forward_length"] = spec.n_ff_shared
    if spec.n_latent:
        values["moe_latent_size"] = spec.n_latent
    if is_native:
        if spec.n_selected:
            values["expert_selected_count"] = spec.n_selected
        values["format.version"] = NATIVE_VERSION
        values["expert_count"] = [shape.n_expert for shape in shapes]
        values["feed_forward_length"] = [shape.n_ff for shape in shapes]
        if not all(shape.has_attention for shape in shapes):
            values["attention.present"] = [int(shape.has_attention) for shape in shapes]
        return values
    if architecture.shared is not None and architecture.shared.width == "counted":
        values["expert_shared_count"] = spec.n_ff_shared // n_ff
    elif architecture.shared is not None and architecture.shared.width == "key_counted":
        values["expert_shared_count"] = min(spec.n_ff_shared, 1)
    elif architecture.shared is not None and architecture.shared.width == "dense":
        values["feed_forward_length"] = values.pop("expert_shared_feed_forward_length")
    if not architecture.may_be_dense:  # llama.cpp demands it of some whose experts have the other key's width.
        values["expert_feed_forward_length"] = n_ff
    if architecture.has_dense_layers:
        keys = dense_layer_keys(shapes)
        assert keys is not None
        values["leading_dense_block_count"], values["interleave_moe_layer_step"] = keys
        if dense:
            values["feed_forward_length"] = dense[0]
    if architecture.has_single_parts:
        values["feed_forward_length"] = [shape.n_ff for shape in shapes]
    return values
