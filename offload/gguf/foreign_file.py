"""Errors for files and directories that were named in place of a GGUF file: what they are, and what to do with them."""

from collections.abc import Mapping
from pathlib import Path

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.keys import TOKENS

_OLD_FORMATS = (b"lmgg", b"fmgg", b"tjgg", b"algg")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LFS = b"version https://git-lfs"
PICKLES = "the weights are PyTorch pickles, which are not read because they can run code."
"""Said of checkpoints of that kind."""


def foreign_file(path: Path, head: bytes) -> ModelFileError:
    """The error for a file that begins with `head`, 32 bytes or fewer, and so is no GGUF file."""
    if is_lfs_pointer(head):
        return lfs_pointer(path)
    text = head.lstrip().lower()
    convert = f"Convert the directory that it lies in: slimoe convert {path.parent} model.gguf."
    if path.suffix == ".safetensors" or head[8:10] == b'{"':
        return ModelFileError(path, "this is a safetensors file, a part of a Hugging Face checkpoint.", convert)
    if path.suffix in _PICKLES or head.startswith((b"PK\x03\x04", b"\x80\x02")):
        problem = "this is a file of PyTorch pickles, which is not read because it can run code."
        return UnsupportedModelError(path, problem, "Save the model as safetensors, and convert its directory.")
    if head.startswith(_OLD_FORMATS):
        problem = "this is a file in a format that llama.cpp had before GGUF."
        return UnsupportedModelError(path, problem, "Get a GGUF file, or convert the model's checkpoint again.")
    if text.startswith((b"<!doctype", b"<html")):
        return ModelFileError(path, "this is a web page: the download went wrong.", "Download the file again.")
    if text.startswith(b"{") and path.suffix == ".json":
        return ModelFileError(path, "this is JSON, not a model.", convert)
    return ModelFileError(path, "this is not a GGUF file.", "Name one, or a checkpoint's directory to convert.")


def foreign_directory(path: Path) -> ModelFileError:
    """The error for a directory where a GGUF file is meant."""
    files = sorted(path.glob("*.gguf"))
    if files:
        return ModelFileError(path, "this is a directory, not a GGUF file.", f"Name the file in it: {files[0]}.")
    if (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        problem = "this is a checkpoint directory, not a GGUF file."
        return ModelFileError(path, problem, f"Convert it first: slimoe convert {path} model.gguf.")
    return ModelFileError(path, "this is a directory, not a GGUF file.", "Name a .gguf file.")


def foreign_model(path: Path, metadata: Mapping[str, object], n_tensors: int) -> UnsupportedModelError | None:
    """The error for a GGUF file that holds no language model, by the keys and the number of tensors in it."""
    values = (metadata.get(f"general.{name}") for name in ("architecture", "type"))
    architecture, kind = (value if isinstance(value, str) else None for value in values)
    if architecture == "clip" or kind == "mmproj":
        problem = "this is a projector for images or sound (mmproj), not a language model."
        return UnsupportedModelError(path, problem, "Name the model's own file; images and sound are not supported.")
    if kind == "adapter":
        problem = "this is a LoRA adapter, not a model."
        return UnsupportedModelError(path, problem, "Merge it into its model, and convert the result.")
    if kind == "imatrix" or architecture == "imatrix":
        problem = "this is an importance matrix, not a model."
        return UnsupportedModelError(path, problem, "Give it to slimoe convert with --imatrix.")
    if not n_tensors and TOKENS in metadata:
        problem = "this is a vocabulary without weights, not a model."
        return UnsupportedModelError(path, problem, "Name the model's own file.")
    return None


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins so stands for one that Git LFS has not fetched yet."""
    return head.startswith(_LFS)


def lfs_pointer(path: Path) -> ModelFileError:
    """The error for a pointer of Git LFS in place of the file."""
    return ModelFileError(path, "this is a pointer of Git LFS, not the file itself.", "Fetch it: git lfs pull.")
