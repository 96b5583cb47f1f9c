"""Latent attention in torch, matrix by matrix, against what llama.cpp multiplies when it reads the same tokens."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.converter.forward.attention_pass import AttentionPass
from slimoe.converter.forward.stream import Observer, Sequences, run
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.offload.ggml.struct import Tensor, array_at, tensor_at
from tests.models.gguf_content import Array
from tests.models.tiny_gguf import FineShape, write_family

SHAPE = FineShape(n_layer=2, n_embd=128, n_head=2, n_expert=8, n_expert_used=2)
TOKENS = random_tokens(40, SHAPE.n_vocab)
ABSORBED = {"attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_k_b", "attn_v_b", "attn_output"}
ROLES = {
    "deepseek2": ABSORBED,
    "mistral4": ABSORBED,
    "deepseek2-lite": ABSORBED - {"attn_q_a", "attn_q_b"} | {"attn_q"},
    "deepseek2-old": ABSORBED - {"attn_k_b", "attn_v_b"} | {"attn_kv_b"},
}


class Passes(Observer):
    """The passes of attention, by layer."""

    def __init__(self) -> None:
        self.seen: dict[int, AttentionPass] = {}

    def attention(self, layer: int, first_row: int, h: torch.Tensor, seen: AttentionPass) -> None:
        self.seen[layer] = seen


def by_token(tensor: Tensor) -> Array:
    """The values [n_tokens, n], or [n_tokens, n_head, n] of a tensor [n, n_tokens, n_head], however it lies."""
    shape, strides = tuple(tensor.ne)[2::-1], tuple(tensor.nb)[2::-1]
    n_values = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) // 4 + 1
    values = as_strided(array_at(tensor.data, np.float32, n_values), shape, strides).copy()
    return values[0] if len(values) == 1 else values.transpose(1, 0, 2)


def in_llama_cpp(path: Path) -> dict[tuple[int, str], tuple[Array, Array]]:
    """What every matrix of attention reads and makes, by layer and role."""
    found: dict[tuple[int, str], tuple[Array, Array]] = {}

    def watch(address: int, asks: bool, _: Any) -> bool:
        tensor = tensor_at(address)
        name = tensor_at(tensor.src[0]).name.decode() if tensor.src[0] else ""
        if not (name.startswith("blk.") and ".attn_" in name and name.endswith(".weight") and tensor.src[1]):
            return not asks
        if not asks and "norm" not in name:
            _, layer, role, _ = name.split(".")
            found[int(layer), role] = by_token(tensor_at(tensor.src[1])), by_token(tensor)
        return True

    callback = llama.ggml_backend_sched_eval_callback(watch)
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False), callback)) as baseline:
        baseline.score(TOKENS)
    return found


@pytest.mark.parametrize("name", ROLES)
def test_matrices_read_and_make_what_they_do_in_llama_cpp(tmp_path: Path, name: str) -> None:
    shape = replace(SHAPE, n_layer=27, n_ff=32) if name == "deepseek2-lite" else SHAPE
    path = write_family(tmp_path / "m.gguf", name, shape=shape)
    ours = Passes()
    run(gguf_source(path), Sequences((tuple(TOKENS),)), ours)
    theirs = in_llama_cpp(path)
    assert {role for _, role in theirs} == ROLES[name]
    for layer in range(SHAPE.n_layer):
        seen = ours.seen[layer]
        assert seen.reads.keys() == seen.products.keys() == ROLES[name]
        for role in ROLES[name]:
            for found, expected in zip((seen.reads[role], seen.products[role]), theirs[layer, role], strict=True):
                assert found.shape == expected.shape
                # Its KV cache is of halves.
                assert np.linalg.norm(found.numpy() - expected) < 1e-2 * np.linalg.norm(expected), (layer, role)
