"""The native format: how a compressed model is stored when no stock architecture can express it.

A native file is a GGUF file whose `general.architecture` is `slimoe`, so that stock loaders refuse it instead of
misreading it. Tokenizer, embeddings, attention, norms and routers are those of a stock file of
`slimoe.base_architecture` (absent: `llama`), with the prefix `slimoe.` in place of its own. The rest is this page;
arrays run over layers, in a layer over experts, in an expert over copies. `general.alignment` may be any; 4096 lets
whole experts be read around the page cache.

Sizes (read by `spec`)
    slimoe.format.version       u32             1
    slimoe.expert_count         i32 [n_layer]   rows of each layer's router; 0: the layer has none, but is dense as in a
                                                stock file, or has no ffn tensors, and the residual passes through
    slimoe.feed_forward_length  i32 [n_layer]   width of each layer's widest expert, or of its dense part; 0 without
    slimoe.expert_used_count    u32             experts that are computed for a token, the first of those it selects
    slimoe.expert_selected_count u32            experts that a token selects, with compressed experts more than are
                                                computed; absent: as many
    slimoe.attention.present    i32 [n_layer]   1, or 0: the layer has no attention, nor a recurrence in its place, and
                                                none of their tensors: the residual passes through; absent: all have.
                                                Never 0 for all. (A reader that does not know the key misses
                                                tensors, and refuses: the version stays.)

Experts. A layer stores experts, numbered from 0. Each has copy 0, the best, and perhaps further ones of fewer bytes.
Copies of equal types and width share a *bucket* of the layer; buckets are numbered from 0 without gaps. Copies of a
bucket lie in its stacks in the order of their experts, so a slot number is counted and not stored.
    slimoe.expert.stored_count  i32 [n_layer]
    slimoe.expert.copy_count    u32             1 or 2
    slimoe.expert.bucket        i32 [sum of stored_count * copy_count]      -1: no such copy (never for copy 0)
    slimoe.expert.target        i32 [sum of expert_count]                   for each row of the router: the stored
                                                expert that it means, or -1 - n for constant n. Rows that mean the same
                                                expert are aliases; no alias can point at an alias.
    blk.L.ffn_gate_exps.bB.weight, blk.L.ffn_up_exps.bB.weight   [n_embd, width, n_slot]
    blk.L.ffn_down_exps.bB.weight                                [width, n_embd, n_slot]
                                                (experts of architectures without a gate have no ffn_gate_exps)
    blk.L.ffn_novice.weight     F32 [n_embd, n]     constant experts, vectors in place of outputs; absent without any

Compressed experts. Where more experts are selected than computed, each row of the router has two vectors for when its
expert is selected, but not computed. The sum of the computed outputs is multiplied with 1 plus `gain` times the
expert's part of the weights of those that are not computed; `shift` times its weight is added. Where weights are scaled
to a sum of 1, it is the sum of the computed experts' weights. Without the vectors the file is refused.
    blk.L.ffn_aux_gain.weight, blk.L.ffn_aux_shift.weight        F32 [n_embd, expert_count]

Hints, all optional, never negative, as `LayerHints` describes them
    slimoe.expert.use, .share_square, .fallback_error, .skip_error, .low_weight      f32 [sum of stored_count]
    slimoe.expert.error         f32 [sum of stored_count * copy_count]      0 for a missing copy
    slimoe.expert.fallback      i32 [sum of stored_count]                   a constant, or -1
    slimoe.layer.sensitivity, .skip_ratio                            f32 [n_layer]
    slimoe.measured_kl          f32 [copy_count]    KL divergence from the source model, nats per token, when every
                                                    expert uses its copy of that number (or its last one)
Provenance has the keys of `gguf.keys`. Unknown keys are ignored, unknown tensors refused.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from gguf import GGMLQuantizationType

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import GGUFFile, Value
from slimoe.offload.gguf.metadata_keys import AGAIN, MetadataKeys
from slimoe.offload.model.native_layout import NO_HINTS, LayerHints, NativeLayer, NativeLayout
from slimoe.offload.model.spec import NATIVE, ModelSpec

ALIGNMENT = 4096
"""The alignment that is written."""

_PREFIX = f"{NATIVE}."
_MAX_COPIES = 2
_NO_COPY = -1
_EXPERT_NUMBERS = ("use", "share_square", "fallback_error", "skip_error", "low_weight")
_LAYER_NUMBERS = ("sensitivity", "skip_ratio")


def stack_name(layer: int, projection: str, bucket: int) -> str:
    """The tensor that holds one projection of a bucket."""
    return f"blk.{layer}.ffn_{projection}_exps.b{bucket}.weight"


def constants_name(layer: int) -> str:
    """The tensor that holds a layer's constant experts."""
    return f"blk.{layer}.ffn_novice.weight"


def layout_metadata(layout: NativeLayout) -> dict[str, Value]:
    """The keys and values of a layout, which `read_layout` reads."""
    n_copy = layout.n_copy
    values: dict[str, Value] = {
        "expert.stored_count": [len(layer.buckets) for layer in layout.layers],
        "expert.copy_count": n_copy,
        "expert.target": [target for layer in layout.layers for target in layer.target],
        "expert.bucket": _joined((layer.buckets for layer in layout.layers), n_copy, _NO_COPY),
        "measured_kl": list(layout.measured_kl or ()),
    }
    hints = [layer.hints for layer in layout.layers if layer.buckets]
    for name in (*_EXPERT_NUMBERS, "fallback"):
        values[f"expert.{name}"] = [value for hint in hints for value in getattr(hint, name) or ()]
    values["expert.error"] = _joined((hint.error or () for hint in hints), n_copy, 0.0)
    for name in _LAYER_NUMBERS:
        if any(getattr(hint, name) is not None for hint in hints):
            values[f"layer.{name}"] = [getattr(layer.hints, name) or 0.0 for layer in layout.layers]
    return {_PREFIX + key: value for key, value in values.items() if value != []}


def _joined(layers: Iterable[Sequence[tuple[Any, ...]]], n_copy: int, missing: float) -> list[Any]:
    """The values of all copies, with `missing` for copies that an expert lacks."""
    experts = (copies for layer in layers for copies in layer)
    return [value for copies in experts for value in (*copies, *[missing] * (n_copy - len(copies)))]


def read_layout(gguf: GGUFFile, spec: ModelSpec) -> NativeLayout:
    """Reads and checks everything that this page describes; the writer checks its plan with it too.

    Raises ModelFileError, which names the key or tensor at fault, and UnsupportedModelError for more copies than two.
    """
    keys = MetadataKeys(gguf, _PREFIX)
    n_copy = keys.count("expert.copy_count")
    if n_copy > _MAX_COPIES:
        raise UnsupportedModelError(gguf.path, f"experts have up to {n_copy} copies; {_MAX_COPIES} are supported.")
    reader = _LayoutReader(keys, spec, keys.integers("expert.stored_count", spec.n_layer), n_copy)
    layers = tuple(reader.layers())
    for index, layer in enumerate(layers):
        _LayerCheck(gguf, spec, index, layer).run()
    return NativeLayout(layers, keys.numbers("measured_kl", n_copy))


class _LayoutReader:
    """Cuts the arrays of the metadata into layers."""

    def __init__(self, keys: MetadataKeys, spec: ModelSpec, stored: Sequence[int], n_copy: int) -> None:
        self.keys, self.stored, self.n_copy = keys, stored, n_copy
        self.n_row = [spec.layer_shape(layer).n_expert for layer in range(spec.n_layer)]
        n_stored = sum(stored)
        self.targets = keys.integers("expert.target", sum(self.n_row), least=-(1 << 31))
        self.buckets = keys.integers("expert.bucket", n_stored * n_copy, _NO_COPY) if n_stored else ()
        self.errors = keys.numbers("expert.error", n_stored * n_copy)
        self.fallbacks = keys.integers("expert.fallback", n_stored, -1) if keys.has("expert.fallback") else None
        self.by_expert = {name: keys.numbers(f"expert.{name}", n_stored) for name in _EXPERT_NUMBERS}
        self.by_layer = {name: keys.numbers(f"layer.{name}", spec.n_layer) for name in _LAYER_NUMBERS}

    def layers(self) -> Iterator[NativeLayer]:
        """Yields every layer; raises ModelFileError."""
        row = expert = 0
        for layer, (n_row, n_stored) in enumerate(zip(self.n_row, self.stored, strict=True)):
            if n_stored and not n_row:
                raise self._error(layer, f"{n_stored} experts are stored, but the layer has no feed-forward part")
            buckets = []
            for begin in range(expert * self.n_copy, (expert + n_stored) * self.n_copy, self.n_copy):
                copies = self.buckets[begin : begin + self.n_copy]
                present = tuple(bucket for bucket in copies if bucket != _NO_COPY)
                if not present or present != copies[: len(present)]:
                    problem = f"expert.bucket gives an expert the copies {list(copies)}, without a best one"
                    raise self._error(layer, problem)
                buckets.append(present)
            hints = self._hints(layer, expert, tuple(buckets))
            yield NativeLayer(self.targets[row : row + n_row], tuple(buckets), hints if n_stored else NO_HINTS)
            row, expert = row + n_row, expert + n_stored

    def _hints(self, layer: int, expert: int, buckets: tuple[tuple[int, ...], ...]) -> LayerHints:
        end = expert + len(buckets)
        values: dict[str, Any] = {name: v and v[expert:end] for name, v in self.by_expert.items()}
        values |= {name: v and v[layer] for name, v in self.by_layer.items()}
        values["fallback"] = self.fallbacks and self.fallbacks[expert:end]
        if self.errors is not None:
            starts = range(expert * self.n_copy, end * self.n_copy, self.n_copy)
            pairs = zip(starts, buckets, strict=True)
            values["error"] = tuple(self.errors[start : start + len(copies)] for start, copies in pairs)
        return LayerHints(**values)

    def _error(self, layer: int, problem: str) -> ModelFileError:
        return ModelFileError(self.keys.gguf.path, f"layer {layer}: {problem}.", AGAIN)


class _LayerCheck:
    """Checks what one layer's keys say, against each other and against the file's tensors."""

    def __init__(self, gguf: GGUFFile, spec: ModelSpec, index: int, layer: NativeLayer) -> None:
        self.gguf, self.spec, self.index, self.layer = gguf, spec, index, layer

    def run(self) -> None:
        """Raises ModelFileError for the first thing that is wrong."""
        constants = self.gguf.tensors.get(constants_name(self.index))
        n_constant, n_stored, target = constants.ne[-1] if constants else 0, len(self.layer.buckets), self.layer.target
        wanted = GGMLQuantizationType.F32, (self.spec.n_embd_expert, n_constant)
        if constants and (constants.type, constants.ne) != wanted:
            found = f"{constants.type.name} {constants.ne}"
            self._refuse(f"tensor {constants.name} is {found}, not F32 [{self.spec.n_embd_expert}, n]")
        for row, value in enumerate(target):
            if not -n_constant <= value < n_stored:
                stored = f"{n_stored} experts and {n_constant} constants are stored"
                self._refuse(f"row {row} of the router means {value} in expert.target, but {stored}")
        for value in self.layer.hints.fallback or ():
            if value >= n_constant:
                self._refuse(f"expert.fallback names constant {value} of {n_constant}")
        if unused := set(range(n_stored)).difference(target):
            self._refuse(f"expert {min(unused)} is stored, but no row of the router means it")
        if target and len(set(target)) < self.spec.n_expert_selected:
            self._refuse(f"it has {len(set(target))} experts, but {self.spec.n_expert_selected} are used per token")
        sizes = [self._bucket_bytes(bucket) for bucket in range(self.layer.n_bucket)]
        for expert, copies in enumerate(self.layer.buckets):
            n_bytes = [sizes[bucket] for bucket in copies]
            if n_bytes != sorted(set(n_bytes), reverse=True):
                self._refuse(f"expert {expert} has copies of {n_bytes} bytes, but each must be smaller than the last")

    def _bucket_bytes(self, bucket: int) -> int:
        """Bytes of one copy in a bucket."""
        n_slot = self.layer.n_slot(bucket)
        if not n_slot:
            self._refuse(f"expert.bucket has numbers above {bucket}, but not {bucket} itself")
        projections = self.spec.architecture.projections
        names = [stack_name(self.index, projection, bucket) for projection in projections]
        if missing := next((name for name in names if name not in self.gguf.tensors), None):
            raise ModelFileError(self.gguf.path, f"tensor {missing} is missing.", AGAIN)
        stacks = [self.gguf.tensors[name] for name in names]
        first = stacks[0]
        width = first.ne[1] if len(first.ne) == 3 else 0
        if not 0 < width <= self.spec.layer_shape(self.index).n_ff:
            self._refuse(f"tensor {first.name} has the shape {first.ne}, which is none of experts of this layer")
        n_embd = self.spec.n_embd_expert
        wide, tall = (n_embd, width, n_slot), (width, n_embd, n_slot)
        for stack, ne in zip(stacks, (*[wide] * (len(stacks) - 1), tall), strict=True):
            if stack.ne != ne:
                self._refuse(f"tensor {stack.name} has the shape {stack.ne}, but {ne} belongs to expert.bucket")
        return sum(stack.n_bytes for stack in stacks) // n_slot

    def _refuse(self, problem: str) -> NoReturn:
        raise ModelFileError(self.gguf.path, f"layer {self.index}: {problem}.", AGAIN)
