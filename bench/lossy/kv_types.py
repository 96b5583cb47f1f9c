"""What each type of the KV cache costs in quality, beside llama.cpp with the same one: KL divergence to a cache of F32.

A text's first tokens are read by this program and by llama.cpp, in batches of 256; the divergence is the mean over all
tokens, with its 99th percentile and the share of tokens whose most likely successor stays the same. The last line of
stdout is one JSON document.

    python -m bench.lossy.kv_types model.gguf text.txt --tokens 1024
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.limits.flags import threads_flag
from slimoe.offload.engine import Engine
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.memory.kv_cache import KV_TYPES
from slimoe.offload.plan.engine_config import ContextConfig, DeviceConfig, EngineConfig
from slimoe.offload.resources.processors import default_threads
from slimoe.server.options.engine_options import DEMO

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


def read(engine: Engine, part: Sequence[int]) -> np.ndarray:
    """Appends tokens; the logits of all of them."""
    return engine.read(part, len(part))


def measure(model: Path, text: str, n_tokens: int, n_threads: int | None) -> dict[str, Any]:
    """What each type costs here and in llama.cpp, by its name."""
    n_ctx, n_threads = -(-n_tokens // _BATCH) * _BATCH, n_threads or default_threads()
    reference, found = None, dict[str, Any]()
    for name in ("f32", *(name for name in KV_TYPES if name != "f32")):
        context = ContextConfig(n_ctx=n_ctx, kv_type=name)
        config = EngineConfig(model, n_threads=n_threads, context=context, devices=DeviceConfig(device="none"))
        with closing(Engine.open(config)) as engine:
            if engine.tokenizer is None:
                raise UsageError(f"{model} has no vocabulary to read a text with.")
            tokens = engine.tokenizer.encode(text)[:n_tokens]
            ours = log_probabilities(partial(read, engine), tokens)
        reference = ours if reference is None else reference
        with closing(LlamaCpp(LlamaCppConfig(model, n_ctx, n_threads, kv_type=KV_TYPES[name]))) as baseline:
            theirs = log_probabilities(baseline.score, tokens)
        found[name] = {"slimoe": compared(reference, ours), "llama.cpp": compared(reference, theirs)}
    return found


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--tokens", "n_tokens", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--smoke", is_flag=True, help="Seconds only, with the demo model: shows that the bench works.")
@threads_flag
def main(model: Path | None, text: Path | None, n_tokens: int, smoke: bool, threads: int | None) -> None:
    """Reads the text with each type."""
    if smoke:
        model, content, n_tokens = DEMO, __doc__ or "", 32
    elif model is None or text is None:
        raise click.UsageError("Name a model and a text.")
    else:
        content = text.read_text(encoding="utf-8")
    try:
        found = measure(model, content, n_tokens, threads)
    except SlimoeError as error:
        sys.exit(f"{error}")
    for name, row in found.items():
        for who, told in row.items():
            line = f"{name:5} {who:10} KL {told['kl']:.2e}, p99 {told['kl_p99']:.2e}, same top {told['same_top']:.4f}"
            print(line, file=sys.stderr)
    ratios = {name: found[name]["llama.cpp"]["kl"] / found[name]["slimoe"]["kl"] for name in ("q8_0", "q4_0")}
    print(json.dumps({"model": model.name, "tokens": n_tokens, "kl_vs_llamacpp": ratios, "types": found}))


if __name__ == "__main__":
    main()
