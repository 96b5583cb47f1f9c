"""Writes a compressed model as a Hugging Face checkpoint: config.json, safetensors, and the files of its tokenizer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from slimoe.converter.gguf.bytes import all_bytes
from slimoe.converter.gguf.writer import Progress, write_pieces
from slimoe.converter.hf.class_config import ClassSizes, class_config
from slimoe.converter.hf.class_limits import check_class
from slimoe.converter.hf.packed import quantization_config
from slimoe.converter.hf.result_tensors import ResultTensors, unpacked_modules
from slimoe.converter.hf.shards import INDEX, SHARD_BYTES, Shard, index_json, shards_of
from slimoe.converter.layout.layer import check_plan, layer_shape
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.converter.source.checkpoint_source import read_model_config
from slimoe.converter.source.families.config import ConfigClass
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.quantiser import statistics_importance
from slimoe.offload.errors import DoesNotFitError, UnsupportedModelError, UsageError
from slimoe.offload.files.whole_file import Destination, free_bytes, whole_directory, write_whole
from slimoe.offload.gguf import keys

_COPIED = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
_COPIED_STEMS = ("license", "notice", "use_policy")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "quantize_config.json", "quant_config.json")
"""Files that are made anew, or speak of weights as they were."""
_TEMPLATES = "additional_chat_templates"
"""The folder of a checkpoint's further chat templates."""
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class NewCheckpoint:
    """A checkpoint to be written: its class, sizes, bits of a weight of experts, files of weights and other `files`.

    `files` are the contents by name, `copied` paths in the source's directory.
    """

    class_name: str
    sizes: ClassSizes
    n_bits: int
    shards: tuple[Shard, ...]
    files: dict[str, bytes]
    copied: tuple[Path, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights' files."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def n_tensors(self) -> int:
        """The number of tensors."""
        return sum(len(stretch.tensors) for shard in self.shards for stretch in shard.stretches)


def lay_out_checkpoint(
    source: ModelSource,
    plan: CompressPlan,
    statistics: Statistics | None = None,
    *,
    n_bits: int = 16,
    shard_bytes: int = SHARD_BYTES,
) -> NewCheckpoint:
    """What `plan` makes of a checkpoint, whose types are of no account; packed with 8 or 4 `n_bits`.

    Reads headers only. Raises UsageError for a source that is no checkpoint, and UnsupportedModelError for what no
    model of its class could be, or compressed-tensors cannot hold.
    """
    check_checkpoint(source)
    checkpoint = Checkpoint.open(source.path)
    family, config = read_model_config(checkpoint)
    class_name = checkpoint.read_config(ConfigClass).name
    if family.nested is not None:
        problem = f"of a {class_name} the language model alone is read, and none is written."
        raise UnsupportedModelError(source.path, problem, "Write a GGUF file, without --hf.")
    if family.architecture.has_window_heads or family.architecture.has_single_parts:
        problem = f"no checkpoint of a {class_name} is written."
        raise UnsupportedModelError(source.path, problem, "Write a GGUF file, without --hf.")
    check_class(source, class_name, plan)
    shapes = [layer_shape(source, layer) for layer in plan.layers]
    routed = next(shape for shape in shapes if shape.n_expert)
    blocks = tuple(layer.block for layer in plan.layers)
    sizes = ClassSizes(routed.n_expert, routed.n_ff, blocks, sum(not shape.n_expert for shape in shapes))
    known = None if statistics is None or not plan.importance else statistics
    importance = statistics_importance(known, is_tied=config.tie_word_embeddings) if known else (lambda _matrix: None)
    stretches = list(ResultTensors(source, checkpoint, family, config, plan, n_bits, importance).all())
    quantisation = None if n_bits == 16 else quantization_config(n_bits, unpacked_modules(stretches))
    provenance = _provenance(source, plan, statistics)
    shards = shards_of(stretches, {key: str(value) for key, value in provenance.items()}, shard_bytes)
    dtypes = {tensor.dtype for one in stretches for tensor in one.tensors if len(tensor.shape) > 1}
    dtype = _DTYPES["F16" if "F16" in dtypes else "BF16"]
    files = {"config.json": class_config(checkpoint, config, sizes, dtype, quantisation, provenance)}
    check_plan(source, plan)
    if len(shards) > 1:
        files[INDEX] = index_json(shards)
    return NewCheckpoint(class_name, sizes, n_bits, shards, files, tuple(copied_files(source.path)))


def _provenance(source: ModelSource, plan: CompressPlan, statistics: Statistics | None) -> dict[str, str | int]:
    """The keys that a GGUF file's header would have, those that the source hands on among them."""
    carried = {key: value for key, value in source.metadata.items() if key in keys.CARRIED}
    found: dict[str, str | int] = {
        keys.SLIMOE_VERSION: version("slimoe"),
        keys.RECIPE: plan.recipe,
        keys.SOURCE_HASH: source.source_hash,
    }
    found |= carried | dict(plan.provenance)
    if statistics is not None:
        found |= {keys.CALIBRATION_HASH: statistics.text_hash, keys.CALIBRATION_TOKENS: statistics.n_tokens}
    return {key: value if isinstance(value, int) else str(value) for key, value in found.items()}


def check_checkpoint(source: ModelSource) -> None:
    """Raises UsageError for a source that is no checkpoint."""
    if not source.path.is_dir():
        problem = f"{source.path} is a GGUF file, and --hf is for Hugging Face checkpoints."
        raise UsageError(f"{problem} Name the checkpoint that it was made of, or leave --hf out.")


def copied_files(path: Path) -> Sequence[Path]:
    """The files of a checkpoint's directory that a compressed one has too: tokenizer, templates, licences, code."""
    found = [
        one
        for one in sorted(path.iterdir())
        if one.name not in _NOT_COPIED and one.name[0] != "." and one.is_file()
        if one.suffix in _COPIED or one.stem.lower() in _COPIED_STEMS
    ]
    return [*found, *sorted((path / _TEMPLATES).glob("*.jinja"))]


def check_directory_target(target: Path, n_bytes: int = 0) -> None:
    """Refuses a directory to be written that is there already, or that the disk has no room for; raises UsageError and
    DoesNotFitError.
    """
    if target.is_symlink() or target.exists():
        problem = f"{target} exists, and no checkpoint is written over anything."
        raise UsageError(f"{problem} Remove it, or choose another name.")
    available = free_bytes(target.absolute().parent)
    if available < n_bytes:
        message = f"The checkpoint needs {n_bytes:,} bytes, but {target.parent} has only {available:,} free."
        hint = "Free some space, or keep fewer experts."
        raise DoesNotFitError(f"{message} {hint}", required_bytes=n_bytes, available_bytes=available)


def write_checkpoint(
    source: ModelSource,
    made: NewCheckpoint,
    destination: Destination,
    *,
    n_threads: int = 1,
    on_progress: Progress = lambda _done, _total: None,
) -> float:
    """Writes a checkpoint as a whole directory or not at all; returns the seconds that it took.

    Holds some matrices of experts for each thread. Raises as `check_directory_target` and `write_pieces` do, and
    ModelFileError for weights that cannot be read or are no numbers.
    """
    begin, n_before = time.monotonic(), 0
    check_directory_target(destination.target, made.n_bytes)
    with whole_directory(destination) as folder:
        for shard in made.shards:
            write_pieces(
                shard.header,
                shard.pieces(),
                folder / shard.name,
                n_bytes=shard.n_bytes,
                n_threads=n_threads,
                force=False,
                on_progress=_shifted(on_progress, n_before, made.n_bytes),
            )
            n_before += shard.n_bytes
        for path in made.copied:
            copy = folder / path.relative_to(source.path)
            copy.parent.mkdir(exist_ok=True)
            write_whole(copy, all_bytes(path))
        for name, data in made.files.items():
            write_whole(folder / name, data)
    return time.monotonic() - begin


def _shifted(on_progress: Progress, n_before: int, n_bytes: int) -> Progress:
    """The progress of one file as that of all of them."""
    return lambda done, _total: on_progress(n_before + done, n_bytes)
