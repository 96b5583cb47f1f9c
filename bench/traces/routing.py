"""Which experts a model selects, seen through llama.cpp: router logits and router inputs of every token.

llama.cpp shows any tensor that it computes, so that the figures are those of an implementation that nobody here
wrote, and of any file it loads.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from slimoe.offload.errors import UsageError
from slimoe.offload.ggml.struct import array_at, tensor_at
from slimoe.offload.gguf.header import read_gguf

Floats = NDArray[np.float32]
ExpertIds = NDArray[np.int64]
_LOGITS, _INPUT = b"ffn_moe_logits-", b"ffn_inp-"


@dataclass(frozen=True, slots=True)
class Routing:
    """What the routers said of a text, and what they read.

    `logits` [n_layer, n_tokens, n_expert]; `inputs` [n_layer, n_tokens, n_embd] is the residual stream before the norm
    of each feed-forward part; each token selects `n_used` experts.
    """

    logits: Floats
    inputs: Floats
    n_used: int

    @property
    def n_expert(self) -> int:
        """Experts that a layer chooses from."""
        return int(self.logits.shape[2])

    @property
    def selected(self) -> ExpertIds:
        """The selected experts [n_layer, n_tokens, n_used], the likeliest first."""
        return best(self.logits, self.n_used)

    @property
    def expert_weights(self) -> Floats:
        """The weights of the selected experts [n_layer, n_tokens, n_used]; a token's sum to 1."""
        logits = np.take_along_axis(self.logits, self.selected, axis=2)
        exponentials = np.exp(logits - logits[..., :1])
        weights: Floats = exponentials / exponentials.sum(axis=2, keepdims=True)
        return weights


@dataclass(frozen=True, slots=True)
class Routers:
    """Every layer's router `weights` [n_layer, n_expert, n_embd] and its norm's `scales` [n_layer, n_embd]."""

    weights: Floats
    scales: Floats
    epsilon: float

    @classmethod
    def read(cls, path: Path) -> "Routers":
        """The routers of a GGUF file; raises UsageError when a layer has none, ModelFileError as `read_gguf` does."""
        metadata = read_gguf(path).metadata
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        architecture = metadata["general.architecture"]
        layers = range(int(metadata[f"{architecture}.block_count"]))
        names = [f"blk.{layer}.ffn_gate_inp.weight" for layer in layers]
        if not tensors.keys() >= set(names):
            raise UsageError(f"{path} has layers without experts. Take a mixture-of-experts model.")
        return cls(
            weights=np.stack([_values(tensors[name]) for name in names]),
            scales=np.stack([_values(tensors[f"blk.{layer}.ffn_norm.weight"]) for layer in layers]),
            epsilon=float(metadata[f"{architecture}.attention.layer_norm_rms_epsilon"]),
        )

    def logits(self, layer: int, stream: Floats) -> Floats:
        """The logits [n_tokens, n_expert] of a layer's router for a residual stream [n_tokens, n_embd]."""
        mean_square = np.mean(stream**2, axis=1, keepdims=True)
        normed = stream / np.sqrt(mean_square + self.epsilon) * self.scales[layer]
        result: Floats = normed @ self.weights[layer].T
        return result


def _values(tensor: gguf.ReaderTensor) -> Floats:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    values: Floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
    return values


def best(scores: Floats, n_used: int) -> ExpertIds:
    """The places of the `n_used` greatest scores along the last axis, greatest first; of equals the first."""
    ids: ExpertIds = np.argsort(-scores, axis=-1, kind="stable")[..., :n_used]
    return ids


def observe(path: Path, texts: Sequence[Sequence[int]], n_threads: int) -> list[Routing]:
    """Reads texts of token ids, each from an empty cache, and watches the routers; raises ModelFileError."""
    n_layer, metadata = len(Routers.read(path).weights), read_gguf(path).metadata
    n_used = int(metadata[f"{metadata['general.architecture']}.expert_used_count"])
    seen: dict[tuple[bytes, int], list[Floats]] = {}

    def watch(address: int, asks: bool, _: Any) -> bool:
        tensor = tensor_at(address)
        name, _, layer = tensor.name.rpartition(b"-")
        if name + b"-" not in (_LOGITS, _INPUT):
            return not asks
        if not asks:
            values = array_at(tensor.data, np.float32, tensor.ne[1], tensor.ne[0])
            seen.setdefault((name + b"-", int(layer)), []).append(values.copy())
        return True

    callback = llama.ggml_backend_sched_eval_callback(watch)
    n_ctx = -(-max(map(len, texts)) // 256) * 256
    routings = []
    with closing(LlamaCpp(LlamaCppConfig(path, n_ctx, n_threads, extra_buffers=False), callback)) as baseline:
        for text in texts:
            seen.clear()
            baseline.truncate(0)
            baseline.score(text)
            logits, inputs = (
                np.stack([np.concatenate(seen[kind, layer]) for layer in range(n_layer)]) for kind in (_LOGITS, _INPUT)
            )
            routings.append(Routing(logits, inputs, n_used))
    return routings
