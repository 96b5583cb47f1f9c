"""The sizes of attention, grouped-query or latent, and the GGUF keys that they are stored under."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import Value
from slimoe.offload.gguf.metadata_keys import AGAIN, MetadataKeys
from slimoe.offload.model.architecture import Architecture


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention (MLA): the keys and values of all heads are made from one low-rank row per token.

    `n_lora_q` and `n_lora_kv` are the ranks of queries and of keys and values; queries of rank 0 come from one matrix.
    Heads have `n_embd_head_k` and `n_embd_head_v` values, of whose keys the last rotate, and are the same in all heads.
    If it `is_absorbed`, the matrices of keys and values are multiplied into queries and outputs, and attention sees one
    head of keys: the low-rank row and the rotated values, of which the low-rank row is the value too.
    """

    n_lora_q: int
    n_lora_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    is_absorbed: bool = True


@dataclass(frozen=True, slots=True)
class Temperature:
    """Queries grow with their position: by 1 + `scale` * ln(1 + floor(position / `length`))."""

    scale: float
    length: int

    def factors(self, positions: NDArray[np.int32]) -> NDArray[np.float32]:
        """The factors of queries at these positions, F32 [n], in llama.cpp's arithmetic."""
        steps = np.floor(positions.astype(np.float32) / np.float32(self.length)).astype(np.float64)
        factors: NDArray[np.float64] = np.log(steps + 1.0) * float(np.float32(self.scale)) + 1.0
        return factors.astype(np.float32)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Attention as the KV cache sees it: `n_head_kv` heads of `n_embd_head` values, shared by `n_head` / `n_head_kv`
    query heads each. Values have `n_embd_head_v` per head, or with 0 as many as keys. With `n_indexed` the model's own
    attention sees as many tokens, which an indexer selects; 0 is for all. If it `is_gated`, each head's query is
    followed by as many values that gate the head's output.
    """

    n_head: int
    n_head_kv: int
    n_embd_head: int
    n_embd_head_v: int = 0
    latent: LatentSpec | None = None
    temperature: Temperature | None = None
    n_indexed: int = 0
    is_gated: bool = False

    @property
    def n_query_rows(self) -> int:
        """Rows of the matrix that makes the queries of all heads, and their gates."""
        return self.n_head * self.n_embd_head * (2 if self.is_gated else 1)

    @property
    def key_length(self) -> int:
        """Values in a head's row of cached keys."""
        return self.n_embd_head

    @property
    def value_length(self) -> int:
        """Values in a head's row of cached values, or of the view of its keys that stands for them."""
        return self.n_embd_head_v or self.n_embd_head

    @property
    def has_values(self) -> bool:
        """Whether the KV cache holds values, and they are not a view of the keys."""
        return self.latent is None or not self.latent.is_absorbed

    @property
    def n_cached(self) -> int:
        """Values of a token in the KV cache, of all heads of one layer."""
        return self.n_head_kv * (self.key_length + (self.value_length if self.has_values else 0))

    @property
    def n_output(self) -> int:
        """Values of all heads that the output matrix reads."""
        return self.n_head * (self.latent.n_embd_head_v if self.latent else self.value_length)

    @property
    def n_decompressed(self) -> int:
        """Values of a token's queries and values once MLA has decompressed them, of all heads; 0 without MLA."""
        return self.n_head * (self.latent.n_embd_head_k + self.latent.n_embd_head_v) if self.latent else 0

    @property
    def n_at_once(self) -> int:
        """An upper estimate of the values of a token that attention holds at one time."""
        return (2 * self.n_head + 4 * self.n_head_kv) * self.n_embd_head + self.n_decompressed


def read_window_attention(
    keys: MetadataKeys, architecture: Architecture, windowed: Sequence[bool], others: AttentionSpec
) -> AttentionSpec | None:
    """The attention of layers with a window, where it may be another than the `others`'. Raises as `read_attention`."""
    if not architecture.has_window_heads:
        return None
    n_head_kv = _heads_by_window(keys, windowed, is_windowed=True)
    n_embd_head = keys.count("attention.key_length_swa", others.n_embd_head)
    _check_heads(keys, others.n_head, n_head_kv)
    if keys.count("attention.value_length_swa", n_embd_head) != n_embd_head:
        raise UnsupportedModelError(keys.gguf.path, "keys and values of different length are not supported.")
    return replace(others, n_head_kv=n_head_kv, n_embd_head=n_embd_head)


def _heads_by_window(keys: MetadataKeys, windowed: Sequence[bool], *, is_windowed: bool) -> int:
    """The key heads of all layers with a window, or of all without one; those of the others where there is none."""
    name = "attention.head_count_kv"
    if not keys.is_array(name):
        return keys.count(name)
    every = keys.integers(name, keys.count("block_count"), least=1)
    own = [n for n, has_window in zip(every, windowed, strict=False) if has_window is is_windowed] or every
    if len(set(own)) > 1:
        problem = f"{keys.prefix}{name} differs between layers {'with' if is_windowed else 'without'} a window."
        raise UnsupportedModelError(keys.gguf.path, problem)
    return own[0]


def _check_heads(keys: MetadataKeys, n_head: int, n_head_kv: int) -> None:
    if n_head % n_head_kv:
        problem = f"{n_head} attention heads do not divide into groups for {n_head_kv} key heads."
        raise ModelFileError(keys.gguf.path, problem, AGAIN)


def read_attention(
    keys: MetadataKeys, architecture: Architecture, n_embd: int, windowed: Sequence[bool] = ()
) -> AttentionSpec:
    """Reads the `attention.` keys; where layers that are `windowed` have heads of their own, those of the others.

    Raises ModelFileError for contradictions, UnsupportedModelError for the unknown.
    """
    if architecture.has_latent_attention:
        return _read_latent(keys, architecture)
    n_head = keys.count("attention.head_count")
    if architecture.has_window_heads:
        n_head_kv = _heads_by_window(keys, windowed, is_windowed=False)
    else:
        n_head_kv = _n_head_kv(keys, architecture, n_head)
    _check_heads(keys, n_head, n_head_kv)
    n_embd_head = keys.count("attention.key_length", n_embd // n_head if n_embd % n_head == 0 else -1)
    if keys.count("attention.value_length", n_embd_head) != n_embd_head:
        raise UnsupportedModelError(keys.gguf.path, "keys and values of different length are not supported.")
    return AttentionSpec(n_head, n_head_kv, n_embd_head, is_gated=architecture.gates_attention)


def _n_head_kv(keys: MetadataKeys, architecture: Architecture, n_head: int) -> int:
    """The key heads of layers that have some; those with a short convolution or Mamba-2 have none."""
    name = "attention.head_count_kv"
    if architecture.recurrence in ("short_conv", "mamba2") and keys.is_array(name):
        counts = set(keys.integers(name, keys.count("block_count"))) - {0}
        if not counts:
            raise ModelFileError(keys.gguf.path, "no layer has attention.", AGAIN)
        if len(counts) != 1:
            raise UnsupportedModelError(keys.gguf.path, f"{keys.prefix}{name} is different in layers with attention.")
        return counts.pop()
    return keys.count(name, n_head)


def _read_latent(keys: MetadataKeys, architecture: Architecture) -> AttentionSpec:
    """Files whose keys name lengths of MLA are absorbed; older ones have the matrices of keys and values as one."""
    n_head = keys.count("attention.head_count")
    n_head_kv = keys.count("attention.head_count_kv", n_head)
    n_lora_q, n_lora_kv = keys.count("attention.q_lora_rank", 0), keys.count("attention.kv_lora_rank")
    n_key, n_value = keys.count("attention.key_length"), keys.count("attention.value_length")
    n_rot = keys.count("rope.dimension_count")
    is_absorbed = keys.has("attention.key_length_mla") or keys.has("attention.value_length_mla")
    lengths, expected = (n_key, n_value), {"head_count_kv": (n_head_kv, n_head)}
    if is_absorbed:
        lengths = keys.count("attention.key_length_mla"), keys.count("attention.value_length_mla")
        expected = {
            "head_count_kv": (n_head_kv, 1),
            "key_length": (n_key, n_lora_kv + n_rot),
            "value_length": (n_value, n_lora_kv),
        }
    wrong = ", ".join(f"{name} is {found}, not {right}" for name, (found, right) in expected.items() if found != right)
    if wrong:
        sizes = f"a kv_lora_rank of {n_lora_kv}, {n_rot} rotated values and {n_head} heads"
        raise ModelFileError(keys.gguf.path, f"its keys of MLA contradict each other: {wrong}, with {sizes}.", AGAIN)
    if n_rot >= lengths[0]:
        raise ModelFileError(keys.gguf.path, f"MLA rotates {n_rot} of {lengths[0]} values per head, not fewer.", AGAIN)
    _check_form(keys, is_absorbed=is_absorbed)
    latent = LatentSpec(n_lora_q, n_lora_kv, *lengths, is_absorbed)
    n_indexed = keys.count("attention.indexer.top_k") if architecture.has_indexer else 0
    return AttentionSpec(n_head, n_head_kv, n_key, n_value, latent, _read_temperature(keys), n_indexed)


def _check_form(keys: MetadataKeys, *, is_absorbed: bool) -> None:
    """Raises ModelFileError where keys and tensors speak of different forms of MLA."""
    names = {name.split(".")[2] for name in keys.gguf.tensors if name.startswith("blk.0.")}
    if names & {"attn_k_b", "attn_v_b"} and not is_absorbed:
        problem = "it has tensors attn_k_b and attn_v_b of MLA, but not its keys attention.key_length_mla and _value."
    elif "attn_kv_b" in names and is_absorbed:
        problem = "its keys say that MLA is absorbed, but keys and values are one tensor attn_kv_b."
    elif "attn_q_a" in names and not keys.count("attention.q_lora_rank", 0):
        problem = "it has the tensor attn_q_a of MLA, but not its key attention.q_lora_rank."
    else:
        return
    raise ModelFileError(keys.gguf.path, problem, AGAIN)


def _read_temperature(keys: MetadataKeys) -> Temperature | None:
    if not keys.value("attention.temperature_scale", 0.0):
        return None
    return Temperature(keys.number("attention.temperature_scale"), keys.count("attention.temperature_length"))


def window_metadata(attention: AttentionSpec, window: AttentionSpec, windowed: Sequence[bool]) -> dict[str, Value]:
    """The keys and values of layers with heads of their own where they are `windowed`, without prefix."""
    return {
        "attention.head_count_kv": [(window if has_window else attention).n_head_kv for has_window in windowed],
        "attention.key_length_swa": window.key_length,
        "attention.value_length_swa": window.value_length,
    }


def attention_metadata(attention: AttentionSpec) -> dict[str, Value]:
    """The keys and values that `read_attention` reads, without prefix."""
    values: dict[str, Value] = {
        "attention.head_count": attention.n_head,
        "attention.head_count_kv": attention.n_head_kv,
        "attention.key_length": attention.key_length,
        "attention.value_length": attention.value_length,
    }
    if latent := attention.latent:
        if latent.n_lora_q:
            values["attention.q_lora_rank"] = latent.n_lora_q
        values["attention.kv_lora_rank"] = latent.n_lora_kv
        if latent.is_absorbed:
            values["attention.key_length_mla"] = latent.n_embd_head_k
            values["attention.value_length_mla"] = latent.n_embd_head_v
    if attention.n_indexed:
        values["attention.indexer.top_k"] = attention.n_indexed
    if attention.temperature:
        values["attention.temperature_scale"] = attention.temperature.scale
        values["attention.temperature_length"] = attention.temperature.length
    return values
