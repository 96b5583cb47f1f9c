"""Writes random Hugging Face checkpoints of true shape: what the converter reads, as `random_model` writes GGUFs."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.models.shapes import Shape
from bench.models.topics import STYLES, RoutingStyle, topical_rows
from slimoe.converter.source.tokenizer.bpe_model import ALPHABET

_CHUNK = 1 << 22


def write_random_checkpoint(path: Path, shape: Shape, *, seed: int = 0, routing: str = "uniform") -> None:
    """Writes a Mixtral in bfloat16: config.json, a safetensors file, and a tokenizer.json of bytes and numbered words.

    `routing` is one of STYLES.
    """
    path.mkdir(parents=True)
    config: dict[str, object] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head_kv,
        "head_dim": shape.head_dim,
        "num_local_experts": shape.n_expert,
        "num_experts_per_tok": shape.n_expert_used,
        "vocab_size": shape.n_vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }
    (path / "config.json").write_text(json.dumps(config))
    words = (f"w{number}" for number in range(shape.n_vocab))
    tokens = list(dict.fromkeys(("w", "0", "w0", *sorted(ALPHABET), *words)))[: shape.n_vocab]
    model = {"type": "BPE", "vocab": {text: token for token, text in enumerate(tokens)}, "merges": ["w 0"]}
    splitting = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    (path / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": splitting}))
    shapes = _tensor_shapes(shape)
    header, offset = {}, 0
    for name, tensor_shape in shapes.items():
        end = offset + 2 * math.prod(tensor_shape)
        header[name] = {"dtype": "BF16", "shape": tensor_shape, "data_offsets": [offset, end]}
        offset = end
    packed = json.dumps(header).encode()
    generator = np.random.default_rng(seed)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        for name, tensor_shape in shapes.items():
            for values in _values(name, tensor_shape, STYLES[routing], generator):
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def _values(
    name: str, shape: tuple[int, ...], style: RoutingStyle, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """A tensor's values, float32, some millions at a time."""
    if "embed_tokens" in name:
        n_rows, n_embd = shape
        yield from topical_rows(n_rows, n_embd, style.topical, int(generator.integers(1 << 32)), _CHUNK // n_embd)
        return
    mean, deviation = 1.0, 0.1
    if "norm" not in name:
        factors = {"o_proj": style.attention, "w2": style.feed_forward, "gate": style.router}
        mean, deviation = 0.0, factors.get(name.split(".")[-2], 1.0) * shape[-1] ** -0.5
    for begin in range(0, math.prod(shape), _CHUNK):
        drawn = generator.standard_normal(min(_CHUNK, math.prod(shape) - begin), np.float32)
        yield drawn * np.float32(deviation) + np.float32(mean)


def _tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    n_embd, n_q, n_kv = shape.n_embd, shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.n_vocab, n_embd)}
    for layer in range(shape.n_layer):
        block = f"model.layers.{layer}."
        shapes[block + "input_layernorm.weight"] = (n_embd,)
        for name, size in (("q", (n_q, n_embd)), ("k", (n_kv, n_embd)), ("v", (n_kv, n_embd)), ("o", (n_embd, n_q))):
            shapes[f"{block}self_attn.{name}_proj.weight"] = size
        shapes[block + "post_attention_layernorm.weight"] = (n_embd,)
        shapes[block + "block_sparse_moe.gate.weight"] = (shape.n_expert, n_embd)
        for expert in range(shape.n_expert):
            for name, size in (
                ("w1", (shape.n_ff, n_embd)),
                ("w2", (n_embd, shape.n_ff)),
                ("w3", (shape.n_ff, n_embd)),
            ):
                shapes[f"{block}block_sparse_moe.experts.{expert}.{name}.weight"] = size
    return shapes | {"model.norm.weight": (n_embd,), "lm_head.weight": (shape.n_vocab, n_embd)}
