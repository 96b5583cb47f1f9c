"""Converts a whole model, a Hugging Face checkpoint directory or a GGUF file, to a GGUF file of types by name.

A conversion is a plan that removes nothing: `layout` and `write` treat it as they treat those of compressed models.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.budget.named_types import smaller_copies_advice, typed_matrices, with_low_copies, with_named_types
from slimoe.converter.budget.structure import whole_layer
from slimoe.converter.gguf.writer import Progress, check_target
from slimoe.converter.layout.layer import Matrix, check_plan
from slimoe.converter.layout.metadata import left_out, llamacpp_problem
from slimoe.converter.layout.offsets import FileLayout, lay_out
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.quant.mixes import TypeRecipe, find_recipe
from slimoe.converter.quant.quantize import needs_importance
from slimoe.converter.quant.unfit_types import TypedMatrix, check_fits, unfit_counts, unfit_notes
from slimoe.converter.source.open_source import model_files, open_source
from slimoe.converter.source.stored_model import StoredModel
from slimoe.converter.source.tokenizer.space_prefix import notes
from slimoe.converter.stats.given_importance import Fitted, GivenImportance, read_importance
from slimoe.converter.stats.type_costs import LOSSLESS
from slimoe.converter.write.matrix import stored_blocks
from slimoe.converter.write.quantiser import PlainQuantiser
from slimoe.converter.write.writer import copied_bytes, write_layout
from slimoe.offload.errors import UnsupportedModelError, UsageError
from slimoe.offload.files.whole_file import Destination
from slimoe.offload.resources.processors import usable_processors

DEFAULT_TYPE = "Q4_K_M"
"""Where nobody names one."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What to convert: the checkpoint directory or GGUF file, the file to write, the name of a type or mix of types.

    0 threads means one a core. `pair`, if any, is in place of `type`: the types "HIGH,LOW" of a native file's two
    copies of every expert. `imatrix` is the file of an importance matrix, or of statistics, to fit weights to. If it
    `keeps_mtp`, so does the file keep the block that predicts a further token.
    """

    source: Path
    target: Path
    type: str | None = None
    n_threads: int = 0
    force: bool = False
    pair: str | None = None
    imatrix: Path | None = None
    keeps_mtp: bool = False


@dataclass(frozen=True, slots=True)
class Conversion:
    """A model, and exactly what file will be made of it.

    `n_copied_bytes` of it are taken over from a GGUF file as they are. `given` is the importance matrix, if there is
    one, and `fitted` says how far it reaches.
    """

    source: StoredModel
    plan: CompressPlan
    layout: FileLayout
    matrices: tuple[TypedMatrix, ...]
    n_copied_bytes: int
    given: GivenImportance | None = None
    fitted: Fitted | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person is told of the file besides its size."""
        spec = self.layout.spec
        told = () if spec.is_native else notes(self.layout.metadata)
        problem = None if spec.is_native else llamacpp_problem(spec)
        return (
            *([f"{problem} slimoe does."] if problem else ()),
            *left_out(self.source),
            *told,
            *unfit_notes(self.matrices, len(self.layout.tensors)),
        )

    def importance(self, matrix: Matrix) -> NDArray[np.float32] | None:
        """Of the matrix's columns [n_per_row]; None where nothing is known of them."""
        return None if self.given is None else self.given.of(matrix.key, matrix.shape[1])

    def report(self, target: Path, seconds: float = 0.0) -> "ConvertReport":
        """What is told of the file at `target` that took so long to write."""
        return ConvertReport(
            path=target,
            recipe=self.plan.recipe,
            n_bytes=self.layout.n_bytes,
            seconds=seconds,
            n_tensors=len(self.layout.tensors),
            bytes_by_type=self.layout.bytes_by_type,
            n_copied_bytes=self.n_copied_bytes,
            fitted=self.fitted,
            unfit_types=unfit_counts(self.matrices),
        )


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was written: path, bytes, seconds it took, number of tensors, tensor bytes by type.

    `n_copied_bytes` of these were taken over from a GGUF file as they were. `fitted` says how far the importance matrix
    reached, if one was given. `unfit_types` counts tensors that have another type than was asked for.
    """

    path: Path
    recipe: str
    n_bytes: int
    seconds: float
    n_tensors: int
    bytes_by_type: dict[str, int]
    n_copied_bytes: int = 0
    fitted: Fitted | None = None
    unfit_types: dict[str, int] = field(default_factory=dict)


def plan(options: ConvertOptions) -> Conversion:
    """Plans everything that will be written, exactly, and that it can be; reads only headers and writes nothing.

    Raises UsageError for an unknown type, for one that needs importance and has none, for second copies that are not
    smaller and for a target that cannot be written; LibraryError where bitsandbytes is needed and absent;
    ModelFileError or UnsupportedModelError for whatever is wrong with the source, or does not fit the type;
    DoesNotFitError where the disk lacks the space; and what `read_importance` raises.
    """
    named = find_recipe(options.type or DEFAULT_TYPE)
    mixes: Sequence[TypeRecipe] = (named,) if options.pair is None else find_pair(options.pair)
    source = open_source(options.source, keeps_mtp=options.keeps_mtp)
    if options.type is None and options.pair is None:
        mixes = (find_recipe(default_type(source)),)
    if len(mixes) > 1 and not source.spec.n_expert:
        raise UnsupportedModelError(source.path, "the model has no experts to store twice.", "Convert it with --type.")
    given = None if options.imatrix is None else read_importance(options.imatrix, source)

    # What the layers get does not depend on the block behind them.
    n_layer = source.spec.n_layer - source.spec.has_mtp_layer

    def wanted(name: str, copy: int) -> Type:
        is_moe = source.spec.n_expert > 0
        return mixes[copy].type_of(name, n_layer, moe=is_moe, tied=source.is_tied)

    asked = ",".join(mix.name for mix in mixes)
    layers = tuple(whole_layer(source, block) for block in range(source.spec.n_layer))
    provenance = {} if given is None else given.metadata
    whole = CompressPlan("stock", layers, Type.F32, None, asked, file_type=mixes[0].file_type, provenance=provenance)
    check_plan(source, whole)
    planned = with_named_types(source, whole, wanted, asked, mixes[0].base, has_copies=len(mixes) > 1)
    if len(mixes) > 1:
        planned = replace(with_low_copies(source, planned, wanted), format="native")
        for layer in planned.layers:
            if layer.experts and not any(expert.low_types for expert in layer.experts):
                problem = f"The second copies of --two-copies {asked} are not smaller than the first in layer"
                raise UsageError(f"{problem} {layer.block}. {smaller_copies_advice(source, planned, mixes[1].base)}")
    layout = lay_out(source, planned)
    matrices = typed_matrices(layout, lambda one: wanted(one.key.name, one.copy))
    for mix in mixes[1:]:
        check_fits(source.path, layout.spec, asked, mix.base, matrices, has_copies=True)
    check_target(options.target, layout.n_bytes, force=options.force, sources=model_files(source))
    fitted = _fitted(source, layout, given)
    return Conversion(source, planned, layout, matrices, copied_bytes(source, layout), given, fitted)


def default_type(source: StoredModel) -> str:
    """The types to convert to where none are named: those that its experts have, if that is MXFP4, which is kept."""
    stored = (source.blocks(key) for key in source.shapes)
    is_mxfp4 = any(blocks and blocks.type is Type.MXFP4 for blocks in stored)
    return "MXFP4_MOE" if is_mxfp4 else DEFAULT_TYPE


def find_pair(names: str) -> Sequence[TypeRecipe]:
    """The types "HIGH,LOW" of two copies; raises UsageError for anything but two known ones."""
    parts = [name.strip() for name in names.split(",")]
    if len(parts) != 2:
        raise UsageError(f"--two-copies is {names!r}, but takes two types: the better one first, such as Q4_K,Q2_K.")
    return [find_recipe(name) for name in parts]


def _fitted(source: StoredModel, layout: FileLayout, given: GivenImportance | None) -> Fitted | None:
    """How far importance reaches; raises UsageError where it is of no use, or where a type needs it and has none."""
    n_matrices = n_fitted = 0
    for tensor in layout.tensors:
        if tensor.type in LOSSLESS:
            continue
        first, n = tensor.matrices[0], sum(stored_blocks(source, one) is None for one in tensor.matrices)
        is_known = n > 0 and given is not None and given.of(first.key, first.shape[1]) is not None
        if n and not is_known and needs_importance(tensor.type):
            kind, larger = tensor.type.name, "use IQ3_S or a larger type"
            if given is None:
                problem = f"{kind} is only of use if it is known which weights matter. Give --imatrix, or {larger}."
                raise UsageError(problem)
            problem = f"{given.path} knows nothing of {tensor.name}, which {kind} needs."
            raise UsageError(f"{problem} Give another imatrix, or {larger}.")
        n_matrices, n_fitted = n_matrices + n, n_fitted + (n if is_known else 0)
    n_experts = sum(layer.n_stored for layer in source.layers)
    return None if given is None else given.reach(n_matrices, n_fitted, n_experts)


def carry_out(
    planned: Conversion, options: ConvertOptions, on_progress: Progress, destination: Destination | None = None
) -> ConvertReport:
    """Writes what was planned, to the target or where it is reserved already; raises as `write_layout` does."""
    begin = time.monotonic()
    write_layout(
        planned.source,
        planned.layout,
        destination or options.target,
        PlainQuantiser(planned.importance),
        n_threads=options.n_threads or usable_processors(),
        force=options.force,
        on_progress=on_progress,
    )
    return planned.report(options.target, time.monotonic() - begin)


def convert(options: ConvertOptions, on_progress: Progress = lambda _done, _total: None) -> ConvertReport:
    """Plans and writes in one go; raises as `plan` and `carry_out` do."""
    return carry_out(plan(options), options, on_progress)
