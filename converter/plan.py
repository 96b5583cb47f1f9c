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
from converter.gguf_header import HeaderTensor, pack_header, padded
from converter.type_recipe import TypeRecipe, find_recipe, fits, fitting_types
from converter.vocabulary import tokenizer_metadata
from offload import file_keys as keys
from offload.errors import ModelFileError, UnsupportedModelError
from offload.gguf_file import GGUFFile, TensorInfo, Value
from offload.model_spec import ModelSpec, check_tensors

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
    checkpoint = Checkpoint.open(source)
    spec = model_spec(checkpoint)
    targets = target_tensors(checkpoint, spec)
    _check_shapes(checkpoint, spec, targets)
    tied = all(target.name != "output.weight" for target in targets)
    types = [_type(source, recipe, spec, target, tied=tied) for target in targets]
    metadata = _general(checkpoint, spec, recipe, targets)
    metadata |= dict(spec.metadata()) | tokenizer_metadata(checkpoint, spec.n_vocab)
    return _placed(source, recipe, spec, metadata, list(zip(targets, types, strict=True)))


def _placed(
    source: Path,
    recipe: TypeRecipe,
    spec: ModelSpec,
    metadata: dict[str, Value],
    typed: list[tuple[TargetTensor, GGMLQuantizationType]],
) -> ConvertPlan:
    entries, sizes, offset = [], [], 0
    for target, kind in typed:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        entries.append(HeaderTensor(target.name, target.ne, kind, offset))
        sizes.append(math.prod(target.ne) // block * block_bytes)
        offset += padded(sizes[-1])
    header = pack_header(metadata, entries)
    tensors = tuple(
        TensorPlan(target, entry.type, len(header) + entry.offset, n_bytes)
        for (target, _), entry, n_bytes in zip(typed, entries, sizes, strict=True)
    )
    return ConvertPlan(source, recipe.name, spec, header, tensors, len(header) + offset)


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
        keys.RECIPE: recipe.name,
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
