"""What each type of the KV cache costs in quality, beside llama.cpp with the same one: KL divergence to a cache of F32.

A text's first tokens are read by this program and by llama.cpp, in batches of 256; the divergence is the mean over all
tokens, with its 99th percentile and the share of tokens whose most likely successor stays the same. The last line of
stdout is one JSON document.

    python -m bench.lossy.kv_types model.gguf text.txt --tokens 1024
"""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from slimoe.offload.engine import Engine
from slimoe.offload.memory.kv_cache import KV_TYPES
from slimoe.offload.plan.engine_config import ContextConfig, DeviceConfig, EngineConfig

_BATCH = 256
Score = Callable[[Sequence[int]], np.ndarray]


def log_probabilities(score: Score, tokens: Sequence[int]) -> np.ndarray:
    """What a model says behind each token, F64 [n_tokens, n_vocab]."""
    rows = [np.array(score(tokens[at : at + _BATCH]), np.float64) for at in range(0, len(tokens), _BATCH)]
    logits = np.concatenate(rows)
    logits -= logits.max(-1, keepdims=True)
    shifted: np.ndarray = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return shifted


def compared(reference: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """The divergence of what was found from the reference, both [n_tokens, n_vocab]."""
    divergence = (np.exp(reference) * (reference - found)).sum(-1)
    same = reference.argmax(-1) == found.argmax(-1)
    p99 = float(np.quantile(divergence, 0.99))
    return {"kl": float(divergence.mean()), "kl_p99": p99, "same_top": float(same.mean())}


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", "n_tokens", default=1024, help="Tokens of the text that are read.")
@click.option("--threads", "n_threads", default=2, help="Threads to compute with.")
def main(model: Path, text: Path, n_tokens: int, n_threads: int) -> None:
    """Reads the text with each type."""
    n_ctx, result, reference = -(-n_tokens // _BATCH) * _BATCH, dict[str, Any](), None
    for name in ("f32", *(name for name in KV_TYPES if name != "f32")):
        context = ContextConfig(n_ctx=n_ctx, kv_type=name)
        config = EngineConfig(model, n_threads=n_threads, context=context, devices=DeviceConfig(device="none"))
        with closing(Engine.open(config)) as engine:
            assert engine.tokenizer, "the file has no vocabulary"
            tokens = engine.tokenizer.encode(text.read_text(encoding="utf-8"))[:n_tokens]
            ours = log_probabilities(lambda part, engine=engine: engine.read(part, len(part)), tokens)  # type: ignore[misc]
        reference = ours if reference is None else reference
        with closing(LlamaCpp(LlamaCppConfig(model, n_ctx, n_threads, kv_type=KV_TYPES[name]))) as baseline:
            theirs = log_probabilities(baseline.score, tokens)
        result[name] = {"slimoe": compared(reference, ours), "llama.cpp": compared(reference, theirs)}
        for who, told in result[name].items():
            print(f"{name:5} {who:10} KL {told['kl']:.2e}, p99 {told['kl_p99']:.2e}, same top {told['same_top']:.4f}")
    print(json.dumps({"model": model.name, "tokens": len(tokens), "types": result}))


if __name__ == "__main__":
    main()
