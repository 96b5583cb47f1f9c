"""Opens whatever holds a model: a checkpoint directory or a GGUF file."""

import os
from pathlib import Path

from slimoe.converter.source.checkpoint_source import checkpoint_source
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.stored_model import StoredModel
from slimoe.offload.errors import ModelFileError
from slimoe.offload.files.regular_file import reason

_OF_A_CHECKPOINT = (".safetensors", ".json", ".model")


def open_source(path: Path, *, keeps_mtp: bool = False) -> StoredModel:
    """The model at `path`, a ModelSource; with `keeps_mtp` the block that predicts a further token is its last layer.

    Raises ModelFileError for what is no model or is damaged, UnsupportedModelError for one that is not read, and
    LibraryError where bitsandbytes is needed and absent.
    """
    if os.path.isdir(path):
        return checkpoint_source(path, keeps_mtp=keeps_mtp)
    try:
        os.stat(path)
    except FileNotFoundError:
        hint = "Name a checkpoint's directory, or a GGUF file."
        raise ModelFileError(path, "there is no such directory or file.", hint) from None
    except OSError as error:
        raise ModelFileError(path, f"the file cannot be read ({reason(error)}).") from None
    return gguf_source(path, keeps_mtp=keeps_mtp)


def model_files(source: ModelSource) -> set[Path]:
    """The files that a model lies in, which nothing that is made of it may take the place of."""
    path = source.path
    own = {one for one in path.iterdir() if one.suffix in _OF_A_CHECKPOINT} if path.is_dir() else {path}
    return own | {blocks.path for key in source.shapes if (blocks := source.blocks(key)) is not None}
