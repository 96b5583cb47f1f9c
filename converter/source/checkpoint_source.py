"""A Hugging Face checkpoint directory as a source of matrices, quantised by bitsandbytes or not."""

import math
import re
from pathlib import Path

from gguf import GGMLQuantizationType

from slimoe.converter.gguf.bytes import all_bytes
from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.converter.source.hf_llama import checkpoint_matrices, model_spec
from slimoe.converter.source.model_config import read_model_config
from slimoe.converter.source.model_source import MatrixKey, SourceLayer
from slimoe.converter.source.rotation import read_rotation
from slimoe.converter.source.stored_model import StoredModel, stock_tensors
from slimoe.converter.source.tokenizer.vocabulary import tokenizer_metadata
from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import GGUFFile, TensorInfo, Value
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import check_tensors


def checkpoint_source(path: Path) -> StoredModel:
    """Opens a directory with config.json, safetensors and a tokenizer, of which only headers are read now.

    Raises ModelFileError or UnsupportedModelError for whatever is wrong with it, and LibraryError where bitsandbytes
    is needed and absent.
    """
    checkpoint = Checkpoint.open(path)
    config = read_model_config(checkpoint)
    rotation = read_rotation(checkpoint.config_path, config)
    spec = model_spec(config, rotation.spec)
    matrices = checkpoint_matrices(checkpoint, config, spec, rotation.divisors)
    tensors = stock_tensors(matrices)
    f32 = GGMLQuantizationType.F32
    infos = {t.name: TensorInfo(t.name, t.ne, f32, 0, 0, 4 * math.prod(t.ne)) for t in tensors}
    check_tensors(GGUFFile((path,), {}, infos), spec)
    if not config.tie_word_embeddings and MatrixKey("output.weight") not in matrices:
        raise ModelFileError(path, "tensor lm_head.weight is missing.", "Download the checkpoint again.")
    layer = SourceLayer(spec.n_expert, tuple(range(spec.n_expert)))
    return StoredModel(
        path, spec, checkpoint.source_hash, _metadata(checkpoint, spec), (layer,) * spec.n_layer, matrices
    )


def _metadata(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Value]:
    values: dict[str, Value] = {"general.type": "model", "general.name": checkpoint.path.resolve().name}
    licence = _licence(checkpoint.path)
    if licence:
        values["general.license"] = licence
    return values | tokenizer_metadata(checkpoint.path, spec.n_vocab)


def _licence(path: Path) -> str | None:
    """The licence that a model card names in its front matter."""
    card = path / "README.md"
    if not card.is_file():
        return None
    head = all_bytes(card)[:4096].decode("utf-8", "replace")
    match = re.search(r"\A---\n(?:.*\n)*?license:[ \t]*([\w.+-]+)[ \t]*\n", head)
    return match[1] if match else None
