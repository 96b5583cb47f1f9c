"""Models that are held in memory: a ModelSource whose matrices a test can change, made from transformers' own."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from slimoe.converter.source.model_source import Blocks, MatrixKey, SourceLayer, block_key, expert_key
from slimoe.converter.source.stored_rows import rotation_order
from slimoe.offload.gguf.header import Value
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import LLAMA
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.rope import RopeSpec
from slimoe.offload.model.spec import ModelSpec
from tests.models.tiny_checkpoint import TinyConfig

Matrices = Mapping[MatrixKey, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A ModelSource over arrays."""

    spec: ModelSpec
    layers: Sequence[SourceLayer]
    matrices: Matrices
    path: Path = Path("held")

    @property
    def source_hash(self) -> str:
        return hashlib.sha256(b"".join(matrix.tobytes() for matrix in self.matrices.values())).hexdigest()

    @property
    def metadata(self) -> Mapping[str, Value]:
        return {}

    @property
    def shapes(self) -> Mapping[MatrixKey, tuple[int, ...]]:
        return {key: matrix.shape for key, matrix in self.matrices.items()}

    def read(self, key: MatrixKey) -> NDArray[np.float32]:
        return self.matrices[key].copy()

    def blocks(self, key: MatrixKey) -> Blocks | None:
        return None

    def changed(self, matrices: Matrices) -> "HeldModel":
        """With other matrices in place of those of the same names, or more of them."""
        return replace(self, matrices={**self.matrices, **matrices})

    def with_layer(self, index: int, layer: SourceLayer) -> "HeldModel":
        layers = list(self.layers)
        layers[index] = layer
        return replace(self, layers=tuple(layers))

    def of(self, architecture: Architecture) -> "HeldModel":
        """The same matrices, computed as that architecture does."""
        return replace(self, spec=replace(self.spec, architecture=architecture))

    def with_blocks(self, blocks: Sequence[int]) -> "HeldModel":
        """Only these of its blocks."""
        matrices = {key: matrix for key, matrix in self.matrices.items() if not key.name.startswith("blk.")}
        for new, old in enumerate(blocks):
            prefix = f"blk.{old}."
            for key, matrix in self.matrices.items():
                if key.name.startswith(prefix):
                    matrices[MatrixKey(f"blk.{new}.{key.name.removeprefix(prefix)}", key.expert)] = matrix
        spec = replace(self.spec, n_layer=len(blocks))
        return replace(self, spec=spec, layers=tuple(self.layers[old] for old in blocks), matrices=matrices)


def random_mixtral(sizes: TinyConfig, spread: float = 0.1, seed: int = 0) -> transformers.MixtralForCausalLM:
    """transformers' Mixtral with random weights and norms, with the attention that it computes step by step."""
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        hidden_size=sizes.n_embd,
        intermediate_size=sizes.n_ff,
        num_hidden_layers=sizes.n_layer,
        num_attention_heads=sizes.n_head,
        num_key_value_heads=sizes.n_head_kv,
        vocab_size=sizes.n_vocab,
        num_local_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        initializer_range=spread,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = transformers.MixtralForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def hold(model: transformers.MixtralForCausalLM) -> HeldModel:
    """The same model as matrices."""
    config = model.config
    n_embd_head = config.hidden_size // config.num_attention_heads
    n_ctx = config.max_position_embeddings
    spec = ModelSpec(
        architecture=LLAMA,
        n_layer=config.num_hidden_layers,
        n_embd=config.hidden_size,
        n_ff=config.intermediate_size,
        n_vocab=config.vocab_size,
        n_ctx_train=n_ctx,
        rms_eps=config.rms_norm_eps,
        attention=AttentionSpec(config.num_attention_heads, config.num_key_value_heads, n_embd_head),
        experts=ExpertSpec(config.num_local_experts, config.num_experts_per_tok),
        rope=RopeSpec(n_rot=n_embd_head, n_ctx_orig=n_ctx, freq_base=config.rope_parameters["rope_theta"]),
    )
    matrices = {
        MatrixKey("token_embd.weight"): _array(model.model.embed_tokens.weight),
        MatrixKey("output_norm.weight"): _array(model.model.norm.weight),
        MatrixKey("output.weight"): _array(model.lm_head.weight),
    }
    for index, layer in enumerate(model.model.layers):
        matrices |= _block(index, layer, n_embd_head)
    n_expert = config.num_local_experts
    layers = tuple(SourceLayer(n_expert, tuple(range(n_expert))) for _ in range(spec.n_layer))
    return HeldModel(spec, layers, matrices)


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = tensor.detach().float().numpy()
    return values


def _block(index: int, layer: torch.nn.Module, n_embd_head: int) -> dict[MatrixKey, NDArray[np.float32]]:
    attention, mixture = layer.self_attn, layer.mlp
    found = {
        block_key(index, "attn_norm"): _array(layer.input_layernorm.weight),
        block_key(index, "attn_q"): rotation_order(_array(attention.q_proj.weight), n_embd_head),
        block_key(index, "attn_k"): rotation_order(_array(attention.k_proj.weight), n_embd_head),
        block_key(index, "attn_v"): _array(attention.v_proj.weight),
        block_key(index, "attn_output"): _array(attention.o_proj.weight),
        block_key(index, "ffn_norm"): _array(layer.post_attention_layernorm.weight),
        block_key(index, "ffn_gate_inp"): _array(mixture.gate.weight),
    }
    for expert, (both, down) in enumerate(zip(mixture.experts.gate_up_proj, mixture.experts.down_proj, strict=True)):
        gate, up = both.chunk(2)
        parts = {"gate": gate, "up": up, "down": down}
        found |= {expert_key(index, name, expert): _array(matrix) for name, matrix in parts.items()}
    return found
