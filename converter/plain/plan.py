"""Decides everything about a conversion before a byte is written: each tensor's type and place, the exact size."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.utility import size_label

from slimoe.converter.gguf.header import ALIGNMENT_KEY, HeaderTensor, alignment_of, pack_header, padded
from slimoe.converter.plain.pair import find_pair, pair_layout, pair_spec, pair_targets
from slimoe.converter.quant.mixes import TypeRecipe, find_recipe
from slimoe.converter.quant.quantize import needs_importance
from slimoe.converter.quant.unfit_types import TypedMatrix, check_fits, typed, unfit_counts, unfit_notes
from slimoe.converter.source.model_source import expert_key
from slimoe.converter.source.open_source import open_source
from slimoe.converter.source.stored_model import StockTensor, StoredModel, stock_tensors
from slimoe.converter.source.stored_rows import StoredRows
from slimoe.converter.source.tokenizer.space_prefix import notes
from slimoe.converter.stats.given_importance import Fitted, GivenImportance, Importance, read_importance
from slimoe.offload.errors import UnsupportedModelError, UsageError
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import Value
from slimoe.offload.model.model_file import check_header
from slimoe.offload.model.native_format import ALIGNMENT, layout_metadata
from slimoe.offload.model.spec import ModelSpec

_QUANTIZATION_VERSION = 2
_NOT_QUANTISED = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_ALWAYS_F32 = ("ffn_gate_inp", "attn_norm", "ffn_norm", "output_norm", "rope_freqs")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the file: what it is made of, its type, and its bytes from `offset` (of the file) on.

    `importance` [n_per_row] of each of its sources' columns, nothing where none is known. `unfit` is the type in whose
    place it has `type`, since that type's blocks do not divide its rows.
    """

    target: StockTensor
    type: GGMLQuantizationType
    offset: int
    n_bytes: int
    importance: tuple[Importance, ...] = ()
    unfit: GGMLQuantizationType | None = None

    @property
    def importances(self) -> tuple[Importance | None, ...]:
        """One for each source."""
        return self.importance or (None,) * len(self.target.sources)

    @property
    def n_quantised(self) -> int:
        """Sources whose weights become blocks here."""
        if self.type in _NOT_QUANTISED:
            return 0
        return sum(not self.is_copied(rows) for rows in self.target.sources)

    def is_copied(self, rows: StoredRows) -> bool:
        """Whether such rows of it are taken over byte for byte: they are blocks of its type already."""
        return rows.blocks is not None and rows.blocks.type is self.type

    @property
    def n_copied_bytes(self) -> int:
        """Bytes of it that are taken over."""
        return sum(rows.blocks.n_bytes for rows in self.target.sources if rows.blocks and self.is_copied(rows))


@dataclass(frozen=True, slots=True)
class ConvertPlan:
    """A whole conversion: the header's bytes, the tensors in file order, and the file's size.

    `fitted` says how far the importance matrix reaches, if one was given. `notes` are for a person.
    """

    source: Path
    recipe: str
    spec: ModelSpec
    header: bytes
    tensors: tuple[TensorPlan, ...]
    n_bytes: int
    fitted: Fitted | None = None
    notes: tuple[str, ...] = ()

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Tensor bytes by type, the largest first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.type.name] += tensor.n_bytes
        return dict(counts.most_common())

    @property
    def matrices(self) -> tuple[TypedMatrix, ...]:
        """The tensors that are no vectors, with their types."""
        matrices = (tensor for tensor in self.tensors if len(tensor.target.ne) > 1)
        return tuple(TypedMatrix(one.target.name, one.target.ne[0], one.type, one.unfit) for one in matrices)

    @property
    def unfit_types(self) -> dict[str, int]:
        """How many tensors have another type than was asked for, such as {"Q4_K to Q5_0": 3}."""
        return unfit_counts(self.matrices)

    @property
    def source_files(self) -> set[Path]:
        """The files that weights are read from."""
        return {rows.path for tensor in self.tensors for rows in tensor.target.sources}

    @property
    def n_copied_bytes(self) -> int:
        """Tensor bytes that are taken over as they are in the source."""
        return sum(tensor.n_copied_bytes for tensor in self.tensors)


def plan_conversion(source: Path, type_name: str, imatrix: Path | None = None) -> ConvertPlan:
    """Plans the conversion of the checkpoint directory or GGUF file `source` with the recipe `type_name`.

    `imatrix` is the file of an importance matrix to fit weights to. Raises UsageError for an unknown type and for one
    that needs importance and has none, LibraryError where bitsandbytes is needed and absent, ModelFileError or
    UnsupportedModelError for whatever is wrong with the source, or does not fit the type, and what `read_importance`
    raises.
    """
    recipe = find_recipe(type_name)
    model = open_source(source)
    spec = stock_spec(model)
    targets = stock_tensors(model.matrices)
    given = read_importance(imatrix, model, targets) if imatrix else None
    metadata = _metadata(model, spec, targets, recipe, given) | {keys.RECIPE: recipe.name}
    planned = _placed(model, recipe.name, spec, metadata, [(target, recipe) for target in targets])
    return _fitted(planned, model, given)


def plan_pair(source: Path, names: str, imatrix: Path | None = None) -> ConvertPlan:
    """Plans a native file with two copies of every expert; `names` are their recipes, "HIGH,LOW".

    Whatever is no expert has the types of the first. Raises as `plan_conversion` does, and UsageError if the second
    copies would not be smaller.
    """
    pair = find_pair(names)
    model = open_source(source)
    if not model.spec.n_expert:
        raise UnsupportedModelError(source, "the model has no experts to store twice.", "Convert it with --type.")
    recipe = ",".join(one.name for one in pair)
    targets = stock_tensors(model.matrices)
    spec = pair_spec(stock_spec(model))
    given = read_importance(imatrix, model, targets) if imatrix else None
    metadata = _metadata(model, spec, targets, pair[0], given) | {keys.RECIPE: recipe, ALIGNMENT_KEY: ALIGNMENT}
    metadata |= layout_metadata(pair_layout(spec))
    planned = _placed(model, recipe, spec, metadata, pair_targets(targets, pair))
    _check_pair(planned)
    return _fitted(planned, model, given)


def stock_spec(model: StoredModel) -> ModelSpec:
    """The sizes in a stock file; raises UnsupportedModelError for a native model that such a file cannot hold."""
    spec = model.spec
    if not spec.is_native:
        return spec
    for index, layer in enumerate(model.layers):
        widths = {model.shapes[expert_key(index, "up", expert)][0] for expert in range(layer.n_stored)}
        rows = tuple(range(spec.n_expert))
        if not layer.has_attention or widths != {spec.n_ff} or (layer.target, layer.n_stored) != (rows, len(rows)):
            problem = f"layer {index} is slimmed in a way that a stock file cannot hold."
            raise UnsupportedModelError(model.path, problem, "Convert the model that this one was made of.")
    return replace(spec, is_native=False, experts=replace(spec.experts, layers=()))


def _check_pair(planned: ConvertPlan) -> None:
    for layer in range(planned.spec.n_layer):
        sizes: Counter[str] = Counter()
        for tensor in planned.tensors:
            if tensor.target.name.startswith(f"blk.{layer}.") and "_exps." in tensor.target.name:
                sizes[tensor.target.name.split(".")[-2]] += tensor.n_bytes
        if sizes["b0"] <= sizes["b1"]:
            problem = (
                f"The second copies of --two-copies {planned.recipe} are not smaller than the first in layer {layer}."
            )
            raise UsageError(f"{problem} Name the better type first, and a smaller one second.")


def _placed(
    model: StoredModel,
    recipe: str,
    spec: ModelSpec,
    metadata: dict[str, Value],
    targets: list[tuple[StockTensor, TypeRecipe]],
) -> ConvertPlan:
    entries, sizes, unfit, offset = [], [], [], 0
    for target, one in targets:
        wanted = _wanted_type(one, spec, target, tied=model.is_tied)
        matrix = typed(target.name, target.ne[0], wanted)
        unfit.append(matrix.unfit)
        block, block_bytes = GGML_QUANT_SIZES[matrix.type]
        entries.append(HeaderTensor(target.name, target.ne, matrix.type, offset))
        sizes.append(math.prod(target.ne) // block * block_bytes)
        offset += padded(sizes[-1], alignment_of(metadata))
    header = pack_header(metadata, entries)
    tensors = tuple(
        TensorPlan(target, entry.type, len(header) + entry.offset, n_bytes, unfit=wanted)
        for (target, _), entry, n_bytes, wanted in zip(targets, entries, sizes, unfit, strict=True)
    )
    told = () if spec.is_native else notes(metadata)
    planned = ConvertPlan(model.path, recipe, spec, header, tensors, len(header) + offset)
    for base in {one.base for _, one in targets}:
        check_fits(model.path, spec, recipe, base, planned.matrices)
    return replace(planned, notes=(*told, *unfit_notes(planned.matrices, len(tensors))))


def _fitted(planned: ConvertPlan, model: StoredModel, given: GivenImportance | None) -> ConvertPlan:
    """The plan with the importance of what is quantised; raises UsageError where a type needs it and has none, and
    ModelFileError or UnsupportedModelError for a file that would not be opened.
    """
    check_header(model.path, planned.header, planned.n_bytes)
    tensors = []
    for tensor in planned.tensors:
        known = given.of(tensor.target, tied=model.is_tied) if given and tensor.n_quantised else ()
        if tensor.n_quantised and not known and needs_importance(tensor.type):
            raise UsageError(_lack_of_importance(tensor, given))
        tensors.append(replace(tensor, importance=known))
    n_matrices = sum(tensor.n_quantised for tensor in tensors)
    n_fitted = sum(tensor.n_quantised for tensor in tensors if tensor.importance)
    n_experts = sum(layer.n_stored for layer in model.layers)
    fitted = given.reach(n_matrices, n_fitted, n_experts) if given else None
    return replace(planned, tensors=tuple(tensors), fitted=fitted)


def _lack_of_importance(tensor: TensorPlan, given: GivenImportance | None) -> str:
    kind, larger = tensor.type.name, "use IQ3_S or a larger type"
    if given is None:
        return f"{kind} is only of use if it is known which weights matter. Give --imatrix, or {larger}."
    return f"{given.path} knows nothing of {tensor.target.name}, which {kind} needs. Give another imatrix, or {larger}."


def _wanted_type(recipe: TypeRecipe, spec: ModelSpec, target: StockTensor, *, tied: bool) -> GGMLQuantizationType:
    if len(target.ne) == 1 or any(part in _ALWAYS_F32 for part in target.name.split(".")):
        return GGMLQuantizationType.F32
    return recipe.type_of(target.name, spec.n_layer, moe=spec.n_expert > 0, tied=tied)


def _metadata(
    model: StoredModel,
    spec: ModelSpec,
    targets: list[StockTensor],
    recipe: TypeRecipe,
    given: GivenImportance | None,
) -> dict[str, Value]:
    n_all = sum(math.prod(target.ne) for target in targets)
    n_experts = sum(math.prod(target.ne) for target in targets if "_exps." in target.name)
    per_expert = n_experts // spec.n_expert if spec.n_expert else 0
    general: dict[str, Value] = {
        "general.architecture": spec.stored_architecture,
        "general.size_label": size_label(n_all, n_all - n_experts, per_expert, spec.n_expert),
        "general.file_type": int(recipe.file_type),
        "general.quantization_version": _QUANTIZATION_VERSION,
        keys.SLIMOE_VERSION: version("slimoe"),
        keys.SOURCE_HASH: model.source_hash,
    }
    return general | spec.metadata() | dict(model.metadata) | dict(given.metadata if given else {})
