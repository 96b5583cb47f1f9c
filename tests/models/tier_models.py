"""Small models that differ in what tiers must get right: types by layer, shards, tied matrices, uneven layers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

from tests.models.gguf_content import GGUFContent, StoredTensor, read_content, write_content, write_shards
from tests.models.native_files import NativeFfn, StoredExpert, plain_ffn, write_native
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

WIDE = TinyShape(n_embd=128, n_head=2, n_head_kv=1)
"""Heads of 64, since GPUs attend with heads of some sizes only."""


def content_of(directory: Path, shape: TinyShape) -> GGUFContent:
    return read_content(write_tiny_gguf(directory / "stock.gguf", None, shape=shape))


def plain_model(directory: Path) -> Path:
    """6 experts, top 3, F32."""
    return write_tiny_gguf(directory / "plain.gguf", None, shape=replace(WIDE, n_layer=4))


def mixed_model(directory: Path) -> Path:
    """4 experts, top 2; their types differ by layer, as Q4_K_M's do."""
    shape = TinyShape(n_layer=3, n_embd=256, n_ff=256, n_expert=4, n_expert_used=2)
    content = content_of(directory, shape)
    content = content.quantised(Type.Q6_K, lambda name: name.startswith(("blk.0.ffn_down", "blk.2.ffn_down", "output")))
    content = content.quantised(Type.Q5_K, lambda name: name.startswith("blk.1.ffn_up"))
    rest = [name for name, tensor in content.tensors.items() if tensor.type is Type.F32]
    return write_content(directory / "mixed.gguf", content.quantised(Type.Q4_K, lambda name: name in rest))


def tied_model(directory: Path) -> Path:
    """F16, the token table is the output as well, all 4 experts are used, and their weights are scaled."""
    content = content_of(directory, replace(WIDE, n_expert=4, n_expert_used=4, n_layer=3))
    content = content.with_values({"output.weight": None}).with_keys({"llama.expert_weights_scale": 1.75})
    return write_content(directory / "tied.gguf", content.quantised(Type.F16))


def apart_model(directory: Path) -> Path:
    """Experts that are tensors of their own, in shards, only one of seven used."""
    stock = content_of(directory, TinyShape(n_expert=7, n_expert_used=1, n_ff=64)).quantised(Type.Q8_0)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stock.tensors.items():
        if "_exps" in name:
            experts = {name.replace("_exps", f".{e}"): data for e, data in enumerate(tensor.data)}
            tensors |= {part: StoredTensor(data, tensor.type) for part, data in experts.items()}
        else:
            tensors[name] = tensor
    folder = directory / "apart"
    folder.mkdir()
    return write_shards(folder, GGUFContent(stock.keys, tensors), 3)


def uneven_model(directory: Path) -> Path:
    """Types and widths that differ inside a layer, rows that mean one expert, constant experts, a layer without any."""
    stock = content_of(directory, replace(WIDE, n_layer=4))
    constants = np.random.default_rng(1).standard_normal((2, WIDE.n_embd), np.float32)
    layers = [
        NativeFfn((StoredExpert(4), StoredExpert(1, (Type.F16,)), StoredExpert(3, (Type.Q8_0,))), (1, 0, 2, 0, 1)),
        None,
        NativeFfn((StoredExpert(2), StoredExpert(5, width=32)), (1, -1, 0, -2), constants),
        plain_ffn(6),
    ]
    return write_native(directory / "uneven.gguf", stock, layers)
