"""Where every byte of a file will be: decided from a plan before a byte is written.

`lay_out` says all of it, `PlanSize` only how much it is, cheaply enough for who compares many plans.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from slimoe.converter.gguf.header import HeaderTensor, alignment_of, header_bytes, pack_header, pack_keys, padded
from slimoe.converter.layout.layer import LayerMatrices, Matrix, check_plan, source_matrix
from slimoe.converter.layout.metadata import (
    carried_metadata,
    merged_metadata,
    own_metadata,
    result_spec,
    whole_metadata,
)
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.quant.mixes import fits, fitting_types
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.errors import UnsupportedModelError, UsageError
from slimoe.offload.gguf.header import Value
from slimoe.offload.model.model_file import check_header
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import model_tensors

_TOKENS, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of the file, `n_bytes` from `offset` of the tensors' data on; `matrices` follow each other in it."""

    name: str
    ne: tuple[int, ...]
    type: Type
    offset: int
    n_bytes: int
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A whole file: its `header`, then the tensors; `n_bytes` altogether."""

    spec: ModelSpec
    metadata: dict[str, Value]
    header: bytes
    tensors: tuple[FileTensor, ...]
    n_bytes: int

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Tensor bytes by type, the largest first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.type.name] += tensor.n_bytes
        return dict(counts.most_common())


def lay_out(source: ModelSource, plan: CompressPlan, statistics: Statistics | None = None) -> FileLayout:
    """The file that a plan makes of a source. `statistics`, if the plan stems from some, are named in the file.

    Raises UnsupportedModelError, which names the layer, for what the format cannot hold or a type that does not divide
    the rows, and UsageError for statistics of another checkpoint.
    """
    check_plan(source, plan)
    if statistics is not None and statistics.source_hash != source.source_hash:
        raise UsageError(f"The statistics are of another checkpoint than {source.path}. Calibrate this one.")
    spec = result_spec(source, plan)
    matrices = list(_matrices(source, plan, spec))
    _check_types(source, matrices)
    if plan.file_type is None:
        own = own_metadata(source, plan, spec, matrices, statistics)
        metadata = merged_metadata(carried_metadata(source), own)
    else:
        metadata = whole_metadata(source, plan, spec, matrices)
    tensors, n_data = _placed(matrices, alignment_of(metadata))
    header = pack_header(metadata, _entries(tensors))
    check_header(source.path, header, len(header) + n_data)
    return FileLayout(spec, metadata, header, tensors, len(header) + n_data)


class PlanSize:
    """Counts the exact bytes of compressed files made of one source; `statistics` as in `lay_out`."""

    def __init__(self, source: ModelSource, statistics: Statistics | None = None) -> None:
        self._source, self._statistics = source, statistics
        self._carried = carried_metadata(source)
        self._n_carried: dict[frozenset[str], int] = {}

    def of(self, plan: CompressPlan) -> int:
        """What `lay_out` says without laying out; raises UnsupportedModelError as it does."""
        check_plan(self._source, plan)
        spec = result_spec(self._source, plan)
        matrices = list(_matrices(self._source, plan, spec))
        _check_types(self._source, matrices)
        own = own_metadata(self._source, plan, spec, matrices, self._statistics)
        tensors, n_data = _placed(matrices, alignment_of(own))
        without = frozenset(own.keys() & self._carried.keys())
        # Packing a vocabulary takes longer than all the rest, so it is done once.
        if without not in self._n_carried:
            kept = {key: value for key, value in self._carried.items() if key not in without}
            self._n_carried[without] = len(pack_keys(kept))
        n_keys = len(pack_keys(own)) + self._n_carried[without]
        return header_bytes(n_keys, _entries(tensors), alignment_of(own)) + n_data


def plan_bytes(plan: CompressPlan, source: ModelSource, statistics: Statistics | None = None) -> int:
    """The exact size of the file that a plan makes, header included; `PlanSize` answers faster for many plans.

    Raises as `PlanSize.of` does.
    """
    return PlanSize(source, statistics).of(plan)


def matrix_bytes(matrix: Matrix) -> int:
    """What a matrix takes in the file, padding not counted."""
    block, block_bytes = GGML_QUANT_SIZES[matrix.type]
    n_bytes: int = matrix.shape[0] * (matrix.shape[1] // block) * block_bytes
    return n_bytes


def _matrices(source: ModelSource, plan: CompressPlan, spec: ModelSpec) -> Iterator[Matrix]:
    """Everything of the file in the order of use, stacks slot after slot; `spec` has the file's sizes."""
    is_tied = MatrixKey(_OUTPUT) not in source.shapes
    assert is_tied or plan.output_type is not None, "the output matrix has no type"
    types = {_TOKENS: plan.token_type, _OUTPUT: plan.output_type}
    for layer, tensors in groupby(model_tensors(spec), key=lambda tensor: tensor.layer):
        if layer >= 0:
            yield from LayerMatrices(source, layer, plan.layers[layer], native=plan.format == "native").all(tensors)
            continue
        for name in (tensor.name for tensor in tensors):
            # A tied table may be stored once more, as an output of another type.
            key, kind = MatrixKey(_TOKENS if is_tied and name == _OUTPUT else name), types.get(name, Type.F32)
            if key in source.shapes and kind is not None:
                yield source_matrix(source, key, name, kind)


def _check_types(source: ModelSource, matrices: Sequence[Matrix]) -> None:
    for matrix in matrices:
        n_per_row = matrix.shape[1]
        if not fits(matrix.type, n_per_row):
            block = GGML_QUANT_SIZES[matrix.type][0]
            what = f"{matrix.key} of {matrix.tensor}" if matrix.key.expert >= 0 else matrix.tensor
            problem = f"layer {matrix.block}: {what} would have" if matrix.block >= 0 else f"{what} would have"
            raise UnsupportedModelError(
                source.path,
                f"{problem} rows of {n_per_row}, which is no multiple of {block}, as {matrix.type.name} needs.",
                f"Use {' or '.join(fitting_types(n_per_row)[-3:])} there.",
            )


def _placed(matrices: Sequence[Matrix], alignment: int) -> tuple[tuple[FileTensor, ...], int]:
    """The tensors one after the other, and their bytes altogether, padding included."""
    stacks: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        stacks.setdefault(matrix.tensor, []).append(matrix)
    tensors, offset = [], 0
    for name, parts in stacks.items():
        first = parts[0]
        assert [(part.type, part.slot) for part in parts] == [(first.type, slot) for slot in range(len(parts))]
        n_bytes = sum(matrix_bytes(part) for part in parts)
        n_rows, n_per_row = sum(part.shape[0] for part in parts), first.shape[1]
        ne: tuple[int, ...] = (n_per_row,) if first.is_vector else (n_per_row, n_rows)
        if first.key.expert >= 0:
            assert {part.shape for part in parts} == {first.shape}
            ne = (n_per_row, first.shape[0], len(parts))
        elif first.n_stack:
            ne = first.stored_shape[::-1]
        tensors.append(FileTensor(name, ne, first.type, offset, n_bytes, tuple(parts)))
        offset += padded(n_bytes, alignment)
    return tuple(tensors), offset


def _entries(tensors: Sequence[FileTensor]) -> list[HeaderTensor]:
    return [HeaderTensor(tensor.name, tensor.ne, tensor.type, tensor.offset) for tensor in tensors]
