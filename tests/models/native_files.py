"""Small files of the native format, made of a stock one's weights and written by gguf's own writer.

`native_logits` is what transformers computes of the same model: its attention and its router, and the experts that the
router's rows mean one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from slimoe.offload.gguf.header import Value, read_gguf
from slimoe.offload.model.expert_spec import ExpertSpec, LayerShape
from slimoe.offload.model.native_format import constants_name, layout_metadata, stack_name
from slimoe.offload.model.native_layout import NO_HINTS, LayerHints, NativeLayer, NativeLayout
from slimoe.offload.model.spec import NATIVE, ModelSpec
from tests.models.gguf_content import Array, GGUFContent, StoredKey, StoredTensor, quantise, stored, write_content

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class StoredExpert:
    """Expert `source` of the stock file, encoded once per type, the best first; `width` cuts it to fewer neurons."""

    source: int
    types: tuple[Type, ...] = (Type.F32,)
    width: int | None = None


@dataclass(frozen=True, slots=True)
class NativeFfn:
    """One layer: what is stored, what the router's first rows mean, and constant experts [n, n_embd]."""

    experts: tuple[StoredExpert, ...]
    target: tuple[int, ...]
    constants: Array | None = None
    hints: LayerHints = NO_HINTS


def plain_ffn(n_expert: int, *types: Type, hints: LayerHints = NO_HINTS) -> NativeFfn:
    """The first `n_expert` experts of a stock file in the given types."""
    experts = tuple(StoredExpert(e, types or (Type.F32,)) for e in range(n_expert))
    return NativeFfn(experts, tuple(range(n_expert)), hints=hints)


def write_native(
    path: Path, stock: GGUFContent, layers: Sequence[NativeFfn | None], measured_kl: tuple[float, ...] | None = None
) -> Path:
    """Writes the model to `path`; None is a layer without a feed-forward part."""
    return write_content(path, native_content(path.with_suffix(".stock"), stock, layers, measured_kl))


def native_content(
    scratch: Path, stock: GGUFContent, layers: Sequence[NativeFfn | None], measured_kl: tuple[float, ...] | None = None
) -> GGUFContent:
    """The same as contents that can be changed before they are written; `scratch` is a path to write the stock one."""
    spec = ModelSpec.from_gguf(read_gguf(write_content(scratch, stock)))
    scratch.unlink()
    shapes = tuple(
        LayerShape(len(ffn.target), max((_width(stock, n, e) for e in ffn.experts), default=1)) if ffn else NO_FFN
        for n, ffn in enumerate(layers)
    )
    experts = ExpertSpec(max(shape.n_expert for shape in shapes), spec.n_expert_used, layers=shapes)
    spec = replace(spec, is_native=True, experts=experts)
    layout = NativeLayout(tuple(_layout(ffn) if ffn else NativeLayer() for ffn in layers), measured_kl)
    keys = {name: key for name, key in stock.keys.items() if not name.startswith("llama.")}
    keys |= {name: _key(value) for name, value in (spec.metadata() | layout_metadata(layout)).items()}
    keys["general.architecture"] = stored(NATIVE)
    tensors = {name: tensor for name, tensor in stock.tensors.items() if ".ffn_" not in name}
    for n, ffn in enumerate(layers):
        tensors |= dict(_tensors(stock, n, ffn)) if ffn else {}
    return GGUFContent(keys, tensors)


NO_FFN = LayerShape(0, 0)


def set_array(content: GGUFContent, key: str, values: list[int] | list[float]) -> GGUFContent:
    """The contents with an array of the metadata replaced; `key` is without the prefix."""
    return replace(content, keys=content.keys | {f"slimoe.{key}": _key(values)})


def _key(value: Value) -> StoredKey:
    if not isinstance(value, list):
        return stored(value)
    item = gguf.GGUFValueType.FLOAT32 if isinstance(value[0], float) else gguf.GGUFValueType.INT32
    return StoredKey(value, gguf.GGUFValueType.ARRAY, item)


def _width(stock: GGUFContent, layer: int, expert: StoredExpert) -> int:
    return expert.width or int(stock.values(f"blk.{layer}.ffn_up_exps.weight").shape[1])


def _buckets(ffn: NativeFfn) -> dict[tuple[Type, int | None], int]:
    """A number for every type and width, in the order in which they are met."""
    kinds = dict.fromkeys((kind, expert.width) for expert in ffn.experts for kind in expert.types)
    return {kind: number for number, kind in enumerate(kinds)}


def _layout(ffn: NativeFfn) -> NativeLayer:
    numbers = _buckets(ffn)
    buckets = tuple(tuple(numbers[kind, expert.width] for kind in expert.types) for expert in ffn.experts)
    return NativeLayer(ffn.target, buckets, ffn.hints)


def _tensors(stock: GGUFContent, layer: int, ffn: NativeFfn) -> Iterator[tuple[str, StoredTensor]]:
    has_biases = f"blk.{layer}.ffn_down_exps.bias" in stock.tensors
    block = f"blk.{layer}."
    if f"{block}ffn_norm.weight" in stock.tensors:
        yield f"{block}ffn_norm.weight", stock.tensors[f"{block}ffn_norm.weight"]
    # An expert's rows of its router: those of the stock file, whose biases go with them.
    rows = [ffn.experts[target].source for target in ffn.target] if has_biases else slice(len(ffn.target))
    for suffix in ("weight", "bias") if has_biases else ("weight",):
        router = stock.values(f"{block}ffn_gate_inp.{suffix}")[rows]
        yield f"{block}ffn_gate_inp.{suffix}", StoredTensor(router, Type.F32)
    for part in PROJECTIONS if has_biases else ():
        biases = stock.values(f"{block}ffn_{part}_exps.bias")[[expert.source for expert in ffn.experts]]
        yield f"{block}ffn_{part}_exps.bias", StoredTensor(biases, Type.F32)
    for (kind, width), number in _buckets(ffn).items():
        members = [e for e in ffn.experts if e.width == width and kind in e.types]
        for part in PROJECTIONS:
            stack = np.stack([matrix(stock, layer, e, part) for e in members])
            values = StoredTensor(stack, kind) if kind is Type.F32 else quantise(stack, kind)
            yield stack_name(layer, part, number), values
    if ffn.constants is not None:
        yield constants_name(layer), StoredTensor(ffn.constants, Type.F32)


def matrix(stock: GGUFContent, layer: int, expert: StoredExpert, part: str) -> Array:
    """One matrix of an expert before it is quantised, [n_out, n_in]."""
    values = stock.values(f"blk.{layer}.ffn_{part}_exps.weight")[expert.source]
    return np.ascontiguousarray(values[:, : expert.width] if part == "down" else values[: expert.width])


def dequantised(stock: GGUFContent, layer: int, expert: StoredExpert, part: str, copy: int) -> Array:
    """One matrix of an expert as copy number `copy` (or its last one) holds it, by gguf's own decoder."""
    values, kind = matrix(stock, layer, expert, part), expert.types[min(copy, len(expert.types) - 1)]
    return values if kind is Type.F32 else gguf.quants.dequantize(quantise(values, kind).data, kind)


class _NativeExperts:
    """In place of transformers' experts: what each row of the router means."""

    def __init__(self, stock: GGUFContent, layer: int, ffn: NativeFfn, copy: int) -> None:
        self.target = ffn.target
        self.constants = None if ffn.constants is None else torch.from_numpy(ffn.constants)
        self.experts = [
            [torch.from_numpy(dequantised(stock, layer, e, part, copy).copy()) for part in PROJECTIONS]
            for e in ffn.experts
        ]

    def forward(self, hidden: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The outputs [n_tokens, n_embd] for hidden states, and the rows that a router selects [n_tokens, n_used]."""
        total = torch.zeros_like(hidden)
        for token, (selected, own) in enumerate(zip(rows.tolist(), weights, strict=True)):
            for row, weight in zip(selected, own, strict=True):
                total[token] += weight * self._output(self.target[row], hidden[token])
        return total

    def _output(self, target: int, hidden: torch.Tensor) -> torch.Tensor:
        if target < 0:
            assert self.constants is not None
            return self.constants[-1 - target]
        gate, up, down = self.experts[target]
        return down @ (torch.nn.functional.silu(gate @ hidden) * (up @ hidden))


def native_logits(
    checkpoint: Path, stock: GGUFContent, layers: Sequence[NativeFfn | None], tokens: list[int], copy: int = 0
) -> Array:
    """Logits [n_tokens, n_vocab] of the checkpoint that `stock` (F32) was made of, with other experts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for n, (block, ffn) in enumerate(zip(model.model.layers, layers, strict=True)):
        if ffn is None:
            block.mlp.forward = torch.zeros_like
            continue
        block.mlp.gate.weight = torch.nn.Parameter(block.mlp.gate.weight[: len(ffn.target)])
        block.mlp.experts.forward = _NativeExperts(stock, n, ffn, copy).forward
    with torch.no_grad():
        result: Array = model(torch.tensor([tokens])).logits[0].numpy()
    return result
