"""The hash of a model. Apart: whatever is kept on disk for a model is found by it."""

import hashlib

from slimoe.offload.files.regular_file import open_regular
from slimoe.offload.gguf.header import GGUFFile

_SAMPLE_BYTES = 4096


def model_hash(gguf: GGUFFile) -> str:
    """A sha256 by which models differ: their settings, the list of their tensors, and the beginning of each tensor."""
    digest = hashlib.sha256(repr({k: v for k, v in gguf.metadata.items() if not isinstance(v, list)}).encode())
    files = [open_regular(path) for path in gguf.paths]
    try:
        for name, tensor in sorted(gguf.tensors.items()):
            digest.update(f"{name} {tensor.type} {tensor.ne} {tensor.n_bytes}".encode())
            files[tensor.shard].seek(tensor.offset)
            digest.update(files[tensor.shard].read(min(_SAMPLE_BYTES, tensor.n_bytes)))
    finally:
        for file in files:
            file.close()
    return digest.hexdigest()
