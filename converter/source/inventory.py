"""What a model file or checkpoint holds, from its headers alone: sizes, types, bytes by kind, tokenizer, provenance."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from slimoe.converter.source.bnb import type_sizes
from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.converter.source.checkpoint_source import read_model_config
from slimoe.converter.source.families.config import ConfigClass
from slimoe.converter.source.tasks import task_note
from slimoe.offload.errors import SlimoeError
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.foreign_file import foreign_model
from slimoe.offload.gguf.header import GGUFFile, Value, read_gguf
from slimoe.offload.model.architecture import PROJECTIONS
from slimoe.offload.model.native_format import read_layout, stack_name
from slimoe.offload.model.native_layout import NO_HINTS, NativeLayout
from slimoe.offload.model.spec import NATIVE, ModelSpec

_KINDS = (
    ("MTP blocks", r"^mtp\."),
    ("image encoder", r"^model\.(visual|vision_tower|embed_vision)\."),
    ("sound encoder", r"^model\.(audio_tower|embed_audio)\."),
    (
        "router",
        r"ffn_gate_inp(?!_shexp)|exp_probs_b|(mlp|block_sparse_moe|feed_forward|mixer)\.(gate|router)\.|\.router\.",
    ),
    ("router", r"e_score_correction_bias|expert_bias"),
    ("norms", r"norm"),
    ("shared experts", r"shexp|shared_expert|shared_mlp"),
    ("constant experts", r"ffn_novice"),
    ("compressed experts", r"ffn_aux_"),
    ("experts", r"_exps|_chexps|ffn_(gate|up|down)\.\d+\.|\.experts\.|block_sparse_moe\.(in|out)put_linear"),
    ("attention", r"attn|ssm|\bconv|shortconv|\.mamba\.|\.mixer\.(?!fc)"),
    ("embeddings", r"embd|embed"),
    ("output", r"^output\.|lm_head"),
    ("feed-forward", r"ffn|mlp|feed_forward|latent_proj"),
)
"""Kinds of tensors and what their names contain, in GGUF and in Hugging Face; the first that matches counts."""


_HF_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_ff": "intermediate_size",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_ctx_train": "max_position_embeddings",
    "n_vocab": "vocab_size",
    "n_expert": "num_local_experts",
    "n_expert_used": "num_experts_per_tok",
}


class _HFSizes(msgspec.Struct, rename=_HF_NAMES):
    """Sizes of a checkpoint of any class, as far as its configuration names them."""

    n_layer: int | None = None
    n_embd: int | None = None
    n_ff: int | None = None
    n_head: int | None = None
    n_head_kv: int | None = None
    n_ctx_train: int | None = None
    n_vocab: int | None = None
    n_expert: int | None = None
    n_expert_used: int | None = None
    num_experts: int | None = None
    moe_intermediate_size: int | None = None

    def by_name(self) -> dict[str, int]:
        """Those that are known, an expert's width and not that of layers without experts."""
        sizes = msgspec.structs.asdict(self)
        n_expert, n_ff = sizes.pop("num_experts"), sizes.pop("moe_intermediate_size")
        sizes |= {"n_expert": sizes["n_expert"] or n_expert, "n_ff": n_ff or sizes["n_ff"]}
        return {name: value for name, value in sizes.items() if value is not None}


_GGUF_SIZES = {
    "n_layer": "block_count",
    "n_embd": "embedding_length",
    "n_ff": "feed_forward_length",
    "n_head": "attention.head_count",
    "n_head_kv": "attention.head_count_kv",
    "n_ctx_train": "context_length",
    "n_vocab": "vocab_size",
    "n_expert": "expert_count",
    "n_expert_used": "expert_used_count",
}
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class KindCount:
    """All tensors of one kind and type: how many, their weights and bytes."""

    kind: str
    type: str
    n_tensors: int
    n_weights: int
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Average bits per weight."""
        return 8 * self.n_bytes / self.n_weights


@dataclass(frozen=True, slots=True)
class Inventory:
    """`format` is "GGUF" or "Hugging Face"; `n_bytes` counts whole files, `counts` tensor data only.

    `experts` says of a native file how many a layer stores, in how many copies, and what else its layers have.
    `routing` says of an architecture that the engine runs how tokens select experts, and what stands beside these.
    `note` says what a file is that holds no language model, or only what a task needs.
    """

    path: Path
    format: str
    architecture: str
    name: str
    sizes: dict[str, Any]
    counts: tuple[KindCount, ...]
    n_bytes: int
    tokenizer: dict[str, Any]
    provenance: dict[str, Any]
    experts: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    note: str | None = None

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return sum(count.n_weights for count in self.counts)

    @property
    def bits_per_weight(self) -> float:
        """Average bits per weight over all tensors."""
        return 8 * sum(count.n_bytes for count in self.counts) / max(self.n_weights, 1)


def take_inventory(path: Path) -> Inventory:
    """Of a GGUF file (of any architecture, sharded or not) or a checkpoint directory.

    Raises ModelFileError for what is neither, or is damaged.
    """
    return _of_checkpoint(Checkpoint.open(path)) if os.path.isdir(path) else _of_gguf(read_gguf(path))


def _of_gguf(gguf: GGUFFile) -> Inventory:
    # A tokenizer's lists are only counted.
    metadata = {
        key: _encodable(value) if isinstance(value, str) or not key.startswith("tokenizer.") else value
        for key, value in gguf.metadata.items()
    }
    foreign = foreign_model(gguf.path, metadata, len(gguf.tensors))
    architecture = str(metadata.get("general.architecture", "unknown"))
    layout = read_layout(gguf, ModelSpec.from_gguf(gguf)) if architecture == NATIVE else None
    spec = _spec(gguf)
    unread = tuple(f"blk.{spec.n_layer + index}." for index in range(spec.n_layer_nextn)) if spec else ()
    copies: dict[str, Counter[int]] = {}  # by number (0 the best), of each stack of a native file
    for index, layer in enumerate(layout.layers if layout else ()):
        for _expert, copy, bucket, _slot in layer.slots():
            for projection in PROJECTIONS:
                copies.setdefault(stack_name(index, projection, bucket), Counter())[copy] += 1
    tensors: list[tuple[str, str, int, int]] = []
    for tensor in gguf.tensors.values():
        of_stack = copies.get(tensor.name)
        if of_stack is None:
            kind = "MTP blocks" if tensor.name.startswith(unread) else _kind_of(tensor.name)
            tensors.append((kind, tensor.type.name, tensor.n_elements, tensor.n_bytes))
            continue
        for copy, n_slot in sorted(of_stack.items()):
            amounts = (amount * n_slot // of_stack.total() for amount in (tensor.n_elements, tensor.n_bytes))
            tensors.append(("low-bit copies" if copy else "experts", tensor.type.name, *amounts))
    values = {name: metadata.get(f"{architecture}.{key}") for name, key in _GGUF_SIZES.items()}
    values["n_ff"] = metadata.get(f"{architecture}.expert_feed_forward_length", values["n_ff"])
    general = {key.removeprefix("general."): metadata[key] for key in metadata if key.startswith("general.")}
    own = _own_keys(metadata)
    if layout and layout.measured_kl is not None:
        own[f"{NATIVE}.measured_kl"] = list(layout.measured_kl)
    return Inventory(
        path=gguf.path,
        format="GGUF",
        architecture=architecture,
        name=str(general.get("name", gguf.path.stem)),
        sizes={
            name: _alike(value.tolist()) if isinstance(value, np.ndarray) else value
            for name, value in values.items()
            if value is not None
        },
        counts=_counts(tensors),
        n_bytes=gguf.n_bytes,
        tokenizer=_gguf_tokenizer(metadata),
        provenance={k: general[k] for k in ("license", "quantized_by", "file_type") if k in general} | own,
        experts=_native_experts(layout) if layout else {},
        routing=_routing(gguf, spec) if spec else {},
        note=f"{foreign.problem} {foreign.hint}" if foreign else task_note(metadata),
    )


def _own_keys(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """What slimoe wrote of where a model is from."""
    return {key: metadata[key] for key in (*keys.PROVENANCE, keys.SPECIALISED, keys.QUALITY) if key in metadata}


def _spec(gguf: GGUFFile) -> ModelSpec | None:
    """What the engine reads of the file's keys, None where it does not run the model."""
    try:
        return ModelSpec.from_gguf(gguf)
    except SlimoeError:
        return None


def _routing(gguf: GGUFFile, spec: ModelSpec) -> dict[str, Any]:
    """How tokens select experts, and what stands beside experts; empty for a model without any."""
    if not spec.n_expert:
        return {}
    experts, shared = spec.experts, spec.architecture.shared
    return {
        "score": spec.router_score,
        "choice_bias": any(".exp_probs_b." in name for name in gguf.tensors),
        "groups": f"{experts.n_group_used} of {experts.n_group}" if experts.n_group > 1 else None,
        "renormalised": spec.renormalises,
        "scale": spec.expert_weights_scale,
        "shared_width": experts.n_ff_shared,
        "shared_gate": bool(shared and shared.gate),
        "dense_layers": sum(not shape.n_expert and bool(shape.n_ff) for shape in experts.layers),
        "dense_width": spec.n_ff_dense,
        "mtp_blocks": spec.n_layer_nextn,
        "recurrent_layers": len(spec.recurrent_layers),
    } | ({"computed": f"{spec.n_expert_used} of {spec.n_expert_selected} selected"} if spec.n_expert_aux else {})


def _native_experts(layout: NativeLayout) -> dict[str, Any]:
    layers = layout.layers
    meant = [[target for target in layer.target if target >= 0] for layer in layers]
    counts = {
        "stored": _alike([len(layer.buckets) for layer in layers]),
        "copies": layout.n_copy,
        "layers_without": sum(not layer.target for layer in layers),
        "aliases": sum(len(targets) - len(set(targets)) for targets in meant),
        "constant_rows": sum(target < 0 for layer in layers for target in layer.target),
    }
    # What the version before called it.
    counts["novice_rows"] = counts["constant_rows"]
    return counts | {"hints": any(layer.hints != NO_HINTS for layer in layers)}


def _alike(values: list[Any]) -> Any:
    """One value in place of a list of equal ones."""
    return values[0] if len(set(values)) == 1 else values


def _gguf_tokenizer(metadata: Mapping[str, Value]) -> dict[str, Any]:
    if keys.TOKENIZER_MODEL not in metadata:
        return {}
    found: dict[str, Any] = {"model": metadata[keys.TOKENIZER_MODEL], "pre": metadata.get(keys.TOKENIZER_PRE)}
    tokens = metadata.get(keys.TOKENS)
    found["n_tokens"] = len(tokens) if isinstance(tokens, list) else None
    for role in ("bos", "eos", "eot", "eom"):
        found[role] = metadata.get(keys.token_id_key(role))
    found["chat_template"] = keys.CHAT_TEMPLATE in metadata
    return {name: value for name, value in found.items() if value is not None}


def _of_checkpoint(checkpoint: Checkpoint) -> Inventory:
    tensors = ((_kind_of(name), kind, n, n_bytes) for name, kind, n, n_bytes in type_sizes(checkpoint))
    files = {tensor.path for tensor in checkpoint.tensors.values()}
    return Inventory(
        path=checkpoint.path,
        format="Hugging Face",
        architecture=checkpoint.read_config(ConfigClass).name,
        name=checkpoint.path.resolve().name,
        sizes=_checkpoint_sizes(checkpoint),
        counts=_counts(tensors),
        n_bytes=sum(file.stat().st_size for file in files),
        tokenizer={"files": [name for name in _TOKENIZER_FILES if (checkpoint.path / name).is_file()]},
        provenance=_own_keys(checkpoint.provenance) | {keys.SOURCE_HASH: checkpoint.source_hash},
        note=task_note(checkpoint.provenance),
    )


def _checkpoint_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """As the converter reads them, or of a class that it does not read, as config.json names them."""
    try:
        config = read_model_config(checkpoint)[1]
    except SlimoeError:
        return checkpoint.read_config(_HFSizes).by_name()
    return {
        "n_layer": config.num_hidden_layers,
        "n_embd": config.hidden_size,
        "n_ff": config.n_ff,
        "n_head": config.num_attention_heads,
        "n_head_kv": config.n_head_kv,
        "n_ctx_train": config.max_position_embeddings,
        "n_vocab": config.vocab_size,
        "n_expert": config.n_expert,
        "n_expert_used": config.n_expert_used,
    }


def _encodable(value: Any) -> Any:
    """A value whose texts can be written: bytes that are no UTF-8 as escapes, such as `\\udced`."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return [_encodable(one) for one in value] if isinstance(value, list) else value


def _counts(tensors: Iterable[tuple[str, str, int, int]]) -> tuple[KindCount, ...]:
    sums: dict[tuple[str, str], list[int]] = {}
    for kind, type_name, n_weights, n_bytes in tensors:
        entry = sums.setdefault((kind, type_name), [0, 0, 0])
        for index, amount in enumerate((1, n_weights, n_bytes)):
            entry[index] += amount
    counts = (KindCount(kind, type_name, *entry) for (kind, type_name), entry in sums.items())
    return tuple(sorted(counts, key=lambda count: -count.n_bytes))


def _kind_of(name: str) -> str:
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other")
