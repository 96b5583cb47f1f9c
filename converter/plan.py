"""Decides everything about a conversion before a byte is written: each tensor's type and place, the exact size."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.utility import size_label

from converter.architecture import TargetTensor, model_spec, target_tensors
from converter.checkpoint import Checkpoint
from converter.gguf_header import ALIGNMENT_KEY, HeaderTensor, alignment_of, pack_header, padded
from converter.pair import find_pair, pair_layout, pair_spec, pair_targets
from converter.type_recipe import TypeRecipe, find_recipe, fits, fitting_types
from converter.vocabulary import tokenizer_metadata
from offload import file_keys as keys
from offload.errors import ModelFileError, UnsupportedModelError, UsageError
from offload.gguf_file import GGUFFile, TensorInfo, Value
from offload.model_spec import ModelSpec, check_tensors
from offload.native_format import ALIGNMENT, layout_metadata, read_layout

_QUANTIZATION_VERSION = 2
_ALWAYS_F32 = ("ffn_gate_inp", "attn_norm", "ffn_norm", "output_norm", "rope_freqs")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the file: what it is made of, its type, and its bytes from `offset` (of the file) on."""

    target: TargetTensor
    type: GGMLQuantizationType
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ConvertPlan:
    """A whole conversion: the header's bytes, the tensors in file order, and the file's size."""

    source: Path
    recipe: str
    spec: ModelSpec
    header: bytes
    tensors: tuple[TensorPlan, ...]
    n_bytes: int

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Tensor bytes by type, the largest first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.type.name] += tensor.n_bytes
        return dict(counts.most_common())


def plan_conversion(source: Path, type_name: str) -> ConvertPlan:
    """Plans the conversion of the checkpoint directory `source` with the recipe `type_name`.

    Raises UsageError for an unknown type, and ModelFileError or UnsupportedModelError for whatever is wrong with
    the checkpoint, or does not fit the type.
    """
    recipe = find_recipe(type_name)
    model = _open(source)
    metadata = _metadata(model, model.spec, recipe, recipe.name)
    return _placed(model, recipe.name, model.spec, metadata, [(target, recipe) for target in model.targets])


def plan_pair(source: Path, names: str) -> ConvertPlan:
    """Plans a native file with two copies of every expert; `names` are their recipes, "HIGH,LOW".

    Whatever is no expert has the types of the first. Raises as `plan_conversion` does, and UsageError if the second
    copies would not be smaller.
    """
    pair = find_pair(names)
    model = _open(source)
    if not model.spec.n_expert:
        raise UnsupportedModelError(source, "the model has no experts to store twice.", "Convert it with --type.")
    recipe = ",".join(one.name for one in pair)
    spec = pair_spec(model.spec)
    metadata = _metadata(model, spec, pair[0], recipe) | {ALIGNMENT_KEY: ALIGNMENT}
    metadata |= layout_metadata(pair_layout(spec))
    planned = _placed(model, recipe, spec, metadata, pair_targets(model.targets, pair))
    _check_pair(planned)
    infos = (TensorInfo(t.target.name, t.target.ne, t.type, 0, t.offset, t.n_bytes) for t in planned.tensors)
    file = GGUFFile((source,), metadata, {info.name: info for info in infos})
    read_layout(file, ModelSpec.from_gguf(file))
    return planned


def _check_pair(planned: ConvertPlan) -> None:
    for layer in range(planned.spec.n_layer):
        sizes: Counter[str] = Counter()
        for tensor in planned.tensors:
            if tensor.target.name.startswith(f"blk.{layer}.") and "_exps." in tensor.target.name:
                sizes[tensor.target.name.split(".")[-2]] += tensor.n_bytes
        if sizes["b0"] <= sizes["b1"]:
            problem = f"The second copies of --pair {planned.recipe} are not smaller than the first in layer {layer}."
            raise UsageError(f"{problem} Name the better type first, and a smaller one second.")


@dataclass(frozen=True, slots=True)
class _Model:
    """A checkpoint, its sizes, and the stock tensors that it makes."""

    checkpoint: Checkpoint
    spec: ModelSpec
    targets: list[TargetTensor]

    @property
    def is_tied(self) -> bool:
        return all(target.name != "output.weight" for target in self.targets)


def _open(source: Path) -> _Model:
    checkpoint = Checkpoint.open(source)
    spec = model_spec(checkpoint)
    targets = target_tensors(checkpoint, spec)
    _check_shapes(checkpoint, spec, targets)
    return _Model(checkpoint, spec, targets)


def _metadata(model: _Model, spec: ModelSpec, recipe: TypeRecipe, recipe_name: str) -> dict[str, Value]:
    metadata = _general(model.checkpoint, spec, recipe, model.targets) | {keys.RECIPE: recipe_name}
    return metadata | spec.metadata() | tokenizer_metadata(model.checkpoint, spec.n_vocab)


def _placed(
    model: _Model,
    recipe: str,
    spec: ModelSpec,
    metadata: dict[str, Value],
    targets: list[tuple[TargetTensor, TypeRecipe]],
) -> ConvertPlan:
    entries, sizes, offset = [], [], 0
    for target, one in targets:
        kind = _type(model.checkpoint.path, one, spec, target, tied=model.is_tied)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        entries.append(HeaderTensor(target.name, target.ne, kind, offset))
        sizes.append(math.prod(target.ne) // block * block_bytes)
        offset += padded(sizes[-1], alignment_of(metadata))
    header = pack_header(metadata, entries)
    tensors = tuple(
        TensorPlan(target, entry.type, len(header) + entry.offset, n_bytes)
        for (target, _), entry, n_bytes in zip(targets, entries, sizes, strict=True)
    )
    return ConvertPlan(model.checkpoint.path, recipe, spec, header, tensors, len(header) + offset)


def _check_shapes(checkpoint: Checkpoint, spec: ModelSpec, targets: list[TargetTensor]) -> None:
    f32 = GGMLQuantizationType.F32
    infos = {t.name: TensorInfo(t.name, t.ne, f32, 0, 0, 4 * math.prod(t.ne)) for t in targets}
    check_tensors(GGUFFile((checkpoint.path,), {}, infos), spec)
    if not checkpoint.config.get("tie_word_embeddings") and "output.weight" not in infos:
        raise ModelFileError(checkpoint.path, "tensor lm_head.weight is missing.", "Download the checkpoint again.")


def _type(
    source: Path, recipe: TypeRecipe, spec: ModelSpec, target: TargetTensor, *, tied: bool
) -> GGMLQuantizationType:
    n_per_row = target.ne[0]
    if len(target.ne) == 1 or any(part in _ALWAYS_F32 for part in target.name.split(".")):
        return GGMLQuantizationType.F32
    kind = recipe.type_of(target.name, spec.n_layer, moe=spec.n_expert > 0, tied=tied)
    if fits(kind, n_per_row):
        return kind
    # The output's Q6_K comes from us, not from the user: where it does not fit, the next larger type does.
    if fits(recipe.base, n_per_row) and fits(GGMLQuantizationType.Q8_0, n_per_row):
        return GGMLQuantizationType.Q8_0
    names = {spec.n_ff: "n_ff", spec.n_embd: "n_embd"}
    what = f"{names.get(n_per_row, 'the row length')} of {n_per_row}"
    block = GGML_QUANT_SIZES[kind][0]
    problem = f"{target.name}: {what} is no multiple of {block}, as {kind.name} in {recipe.name} needs."
    raise UnsupportedModelError(source, problem, f"Use --type {' or '.join(_suggestions(spec))}.")


def _suggestions(spec: ModelSpec) -> list[str]:
    """The three smallest types that fit every matrix of the model."""
    return fitting_types(math.gcd(spec.n_embd, spec.n_ff, spec.n_head * spec.n_embd_head))[-3:]


def _general(
    checkpoint: Checkpoint, spec: ModelSpec, recipe: TypeRecipe, targets: list[TargetTensor]
) -> dict[str, Value]:
    n_all = sum(math.prod(target.ne) for target in targets)
    n_experts = sum(math.prod(target.ne) for target in targets if "_exps." in target.name)
    per_expert = n_experts // spec.n_expert if spec.n_expert else 0
    values: dict[str, Value] = {
        "general.architecture": spec.architecture,
        "general.type": "model",
        "general.name": checkpoint.path.resolve().name,
        "general.size_label": size_label(n_all, n_all - n_experts, per_expert, spec.n_expert),
        "general.file_type": int(recipe.file_type),
        "general.quantization_version": _QUANTIZATION_VERSION,
        keys.SLIMOE_VERSION: version("slimoe"),
        keys.SOURCE_HASH: checkpoint.source_hash,
    }
    licence = _licence(checkpoint.path)
    return values | ({"general.license": licence} if licence else {})


def _licence(path: Path) -> str | None:
    """The licence that a model card names in its front matter."""
    card = path / "README.md"
    if not card.is_file():
        return None
    with card.open("rb") as file:
        head = file.read(4096).decode("utf-8", "replace")
    match = re.search(r"\A---\n(?:.*\n)*?license:[ \t]*([\w.+-]+)[ \t]*\n", head)
    return match[1] if match else None
