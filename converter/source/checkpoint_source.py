"""A Hugging Face checkpoint directory as a source of matrices, quantised by bitsandbytes or not."""

import math
import re
from collections import Counter
from pathlib import Path

from gguf import GGMLQuantizationType

from slimoe.converter.gguf.bytes import all_bytes
from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.converter.source.families import (
    deepseek,
    ernie,
    gemma,
    glm,
    gptoss,
    granite,
    hunyuan,
    hybrids,
    ling,
    llama,
    minimax,
    olmoe,
    phi,
    qwen,
    qwen_next,
)
from slimoe.converter.source.families.config import ConfigClass, ModelConfig
from slimoe.converter.source.families.family import Family
from slimoe.converter.source.hf_tensors import checkpoint_matrices, model_spec, skipped_prefixes
from slimoe.converter.source.model_source import MatrixKey, SourceLayer
from slimoe.converter.source.rotation import read_rotation
from slimoe.converter.source.stored_model import LATER_BLOCKS, StoredModel, no_mtp_block
from slimoe.converter.source.tokenizer.vocabulary import tokenizer_metadata
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import GGUFFile, TensorInfo, Value
from slimoe.offload.model.architectures import variant_of
from slimoe.offload.model.mtp_block import with_mtp_layer
from slimoe.offload.model.tensor_list import check_tensors

_FILES = (
    *(
        llama,
        phi,
        qwen,
        olmoe,
        granite,
        ernie,
        hunyuan,
        hybrids,
        minimax,
        glm,
        deepseek,
        gptoss,
        ling,
        qwen_next,
        gemma,
    ),
)
FAMILIES: dict[str, Family] = {name: family for file in _FILES for name, family in file.FAMILIES.items()}
"""The families that are read, by the name of their model class, `architectures` of config.json."""

_IMAGES = (".visual.", ".vision_tower.", ".audio_tower.", ".embed_vision.", ".embed_audio.")
"""Parts of the names of tensors that have to do with images, or with sounds where a model hears as well."""
_LEFT_OUT = {
    False: "What predicts further tokens (MTP) is left out: {why}.",
    True: "What reads images is left out: the language model is what is converted.",
}
"""What is told of tensors that are not read, by whether they are an image encoder's."""
_LICENCE = re.compile(r"\A---\n(?:.*\n)*?license:[ \t]*([\w.+-]+)[ \t]*\n")
"""The licence that a model card names in its front matter."""


def checkpoint_source(path: Path, *, keeps_mtp: bool = False) -> StoredModel:
    """Opens a directory with config.json, safetensors and a tokenizer, of which only headers are read now.

    With `keeps_mtp` the block that predicts a further token is the last layer.
    Raises ModelFileError or UnsupportedModelError for whatever is wrong with it, and LibraryError where bitsandbytes
    is needed and absent.
    """
    checkpoint = Checkpoint.open(path)
    family, config = read_model_config(checkpoint)
    rotation = read_rotation(checkpoint.config_path, config, family.architecture)
    spec = model_spec(family, config, rotation.spec)
    if spec.n_expert_used > spec.n_expert:
        problem = f"a token selects {spec.n_expert_used} of {spec.n_expert} experts."
        raise ModelFileError(checkpoint.config_path, problem, "Download the checkpoint again.")
    if keeps_mtp and not spec.architecture.has_mtp:
        raise no_mtp_block(path)
    spec = with_mtp_layer(spec) if keeps_mtp else spec
    matrices = checkpoint_matrices(checkpoint, family, config, spec, rotation.divisors)
    if keeps_mtp and MatrixKey(f"blk.{spec.n_layer - 1}.nextn.eh_proj.weight") not in matrices:
        raise no_mtp_block(path)
    n_matrices = Counter(key.name for key in matrices)
    tensors = {}
    for key, matrix in matrices.items():
        ne = (*matrix.shape[::-1], *((n_matrices[key.name],) if key.expert >= 0 else ()))
        tensors[key.name] = TensorInfo(key.name, ne, GGMLQuantizationType.F32, 0, 0, 4 * math.prod(ne))
    check_tensors(GGUFFile((path,), {}, tensors), spec)
    for layer in spec.attention_layers:
        # A GGUF file may have none: then values are the keys, as only config.json may say.
        if f"blk.{layer}.attn_k.weight" in tensors and layer not in config.without_values:
            name = f"blk.{layer}.attn_v.weight"
            if name not in tensors:
                raise ModelFileError(path, f"tensor {name} is missing.", "Download the checkpoint again.")
    if not config.tie_word_embeddings and MatrixKey("output.weight") not in matrices:
        raise ModelFileError(path, "tensor lm_head.weight is missing.", "Download the checkpoint again.")
    shapes = [spec.layer_shape(layer) for layer in range(spec.n_layer)]
    layers = tuple(
        SourceLayer(one.n_expert, tuple(range(one.n_expert)), one.has_attention, bool(one.n_ff)) for one in shapes
    )
    metadata: dict[str, Value] = {"general.type": "model", "general.name": path.resolve().name}
    card = path / "README.md"
    head = all_bytes(card)[:4096].decode("utf-8", "replace") if card.is_file() else ""
    if licence := _LICENCE.search(head):
        metadata["general.license"] = licence[1]
    metadata |= {key: value for key, value in checkpoint.provenance.items() if key in keys.CARRIED}
    metadata |= tokenizer_metadata(path, spec.n_vocab, family.token_ids)
    skipped = skipped_prefixes(family, config, keeps_mtp=keeps_mtp)
    unread = [name for name in checkpoint.tensors if name.startswith(skipped)] if skipped else []
    why = "--mtp keeps it" if spec.architecture.has_mtp else "nothing runs it"
    left_out = tuple(
        LATER_BLOCKS if keeps_mtp and not is_image else note.format(why=why)
        for is_image, note in _LEFT_OUT.items()
        if any(any(part in one for part in _IMAGES) is is_image for one in unread)
    )
    return StoredModel(path, spec, checkpoint.source_hash, metadata, layers, matrices, (*left_out, *config.notes))


def read_model_config(checkpoint: Checkpoint) -> tuple[Family, ModelConfig]:
    """Reads which family a checkpoint is of, and its settings.

    Raises ModelFileError for values of wrong types or sizes, UnsupportedModelError for a family that is not read or a
    setting that a GGUF file cannot express.
    """
    kind = checkpoint.read_config(ConfigClass)
    family = FAMILIES.get(kind.name)
    if family is None:
        of_type = f" of model_type {kind.model_type!r:.100}" if kind.model_type else ""
        unknown = f"the architecture {kind.name!r:.100}{of_type} is not supported{variant_of(kind.model_type or '')}."
        raise UnsupportedModelError(checkpoint.path, f"{unknown} Those that are: {', '.join(FAMILIES)}.")
    if kind.model_type not in (None, family.model_type):
        mixed_up = f"model_type is {kind.model_type!r:.100}, but {kind.name} belongs to {family.model_type!r}."
        raise UnsupportedModelError(checkpoint.config_path, mixed_up, "Correct the one that is wrong.")
    config = checkpoint.read_config(family.nested).language if family.nested else checkpoint.read_config(family.config)
    problem = config.unsupported(family.architecture)
    if problem:
        raise UnsupportedModelError(checkpoint.config_path, problem)
    return family, config
