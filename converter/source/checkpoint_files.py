"""Which files of a directory hold a checkpoint's weights, and what a directory is that is no such checkpoint."""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from slimoe.converter.document import read_json
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.foreign_file import PICKLES

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_AGAIN = "Download the checkpoint again."
_EXAMPLES = 3


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def check_directory(path: Path) -> None:
    """Raises ModelFileError or UnsupportedModelError for a directory that is no checkpoint of a whole model."""
    if (path / "adapter_config.json").is_file():
        problem = "this is a LoRA adapter, a change to another model, which is not read."
        hint = "Merge it into that model (peft's merge_and_unload), save the result, and convert that."
        raise UnsupportedModelError(path, problem, hint)
    if (path / "config.json").is_file():
        return
    names = sorted(one.name for one in path.iterdir())
    if not names:
        raise ModelFileError(path, "this directory is empty.", "Download the checkpoint into it.")
    hint = "Name the directory with config.json and the safetensors files."
    if "params.json" in names or any(name.startswith("consolidated.") for name in names):
        problem = "this is a checkpoint in the layout of its makers (params.json, consolidated.*), not Hugging Face's."
        raise UnsupportedModelError(path, problem, "Get it in Hugging Face's layout, with config.json and safetensors.")
    if files := [name for name in names if name.endswith(".gguf")]:
        problem = "this directory is no checkpoint: it has no config.json, but GGUF files."
        raise ModelFileError(path, problem, f"Name one of them: {path / files[0]}.")
    raise ModelFileError(path, f"this directory is no checkpoint: it has no config.json, but {_listed(names)}.", hint)


def weight_files(path: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the safetensors files to read, and which of them each tensor must be in, as far as that is said.

    As in transformers, one whole file counts before an index; shards whose names count them need no index. Raises
    ModelFileError where some are missing, UnsupportedModelError for weights of another format.
    """
    if (path / _SINGLE).is_file():
        return [_SINGLE], {}
    if (path / _INDEX).is_file():
        owners = read_json(path / _INDEX, _Index).weight_map
        if not owners:
            raise ModelFileError(path / _INDEX, "the index has an empty weight_map.", _AGAIN)
        shards = sorted(set(owners.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise ModelFileError(path / _INDEX, f"the index names {shard!r}, which is no file's name.", _AGAIN)
            if not (path / shard).is_file():
                raise ModelFileError(path, f"shard {shard} is missing.", _AGAIN)
        return shards, owners
    names = sorted(one.name for one in path.iterdir())
    counted = {match[0]: (int(match[1]), int(match[2])) for name in names if (match := _SHARD.fullmatch(name))}
    if counted:
        totals = sorted({total for _, total in counted.values()})
        if len(totals) > 1:
            problem = f"there are shards of {totals[0]} and of {totals[1]} in all, and no {_INDEX} says which count."
            raise ModelFileError(path, problem, _AGAIN)
        for number in range(1, totals[0] + 1):
            name = f"model-{number:05d}-of-{totals[0]:05d}.safetensors"
            if name not in counted:
                raise ModelFileError(path, f"shard {name} is missing.", _AGAIN)
        return list(counted), {}
    raise _without_weights(path, names)


def _without_weights(path: Path, names: Sequence[str]) -> ModelFileError:
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return UnsupportedModelError(path, PICKLES, "Save the model as safetensors.")
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        problem = f"this directory holds {_listed(others)}, but neither {_SINGLE}, nor {_INDEX}, nor shards of it"
        return ModelFileError(path, f"{problem} (model-00001-of-0000N.safetensors).", "Name them so.")
    problem = f"this directory holds no weights ({_SINGLE} or {_INDEX})."
    return ModelFileError(path, problem, _AGAIN)


def _listed(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are."""
    more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
    return ", ".join(names[:_EXAMPLES]) + more
