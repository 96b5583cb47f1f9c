"""How a model chooses its experts: the figures on which a cache of experts lives, per layer.

How unevenly experts are selected (the part of the busiest one, over all texts and within one), how long a selection
lasts (how often the previous token selected an expert too, and what a least-recently-used cache would hold), and how
well it can be predicted (how many of them the routers of the next layers name from this layer's input). Of a GGUF file,
of a checkpoint, or of a random model; read by llama.cpp. The table goes to stderr, the last line of stdout is one JSON
document.

    python -m bench.routing_stats --checkpoint ~/models/Mixtral-8x7B --text article.txt
    python -m bench.routing_stats --shape design8 --routing natural
"""

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.limits.flags import threads_flag
from bench.models.random_model import random_model_file
from bench.models.shapes import MODELS
from bench.models.topics import STYLES, TOKENS
from bench.traces.routing import ExpertIds, Floats, Routers, Routing, best, observe
from slimoe.converter.convert import ConvertOptions, convert
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.resources.processors import default_threads
from slimoe.offload.text.tokenizer import Tokenizer

AHEAD = (1, 2)
LRU_SHARES = (0.25, 0.5, 0.75)
N_RANDOM_TEXTS = 4
OLD_FIGURES = {"first_share": "first_weight", "repeat_pick": "repeat_selected"}
"""Old names of figures that are still written for one version."""


def frequencies(routings: Sequence[Routing]) -> Floats:
    """How often each expert is among the selected ones, [n_layer, n_expert]; a layer's sum to 1."""
    n_expert = routings[0].n_expert
    selected = np.concatenate([routing.selected for routing in routings], axis=1)
    counts = (selected[..., None] == np.arange(n_expert)).sum(axis=(1, 2))
    result: Floats = counts / counts.sum(axis=1, keepdims=True)
    return result


def first_repeats(routings: Sequence[Routing]) -> Floats:
    """How often a token's likeliest expert is the previous token's likeliest, [n_layer]."""
    return _mean_over_tokens(ids[:, 1:, 0] == ids[:, :-1, 0] for ids in (r.selected for r in routings))


def repeats(routings: Sequence[Routing]) -> Floats:
    """How many of the selected experts the previous token selected as well, [n_layer]; by chance n_used / n_expert."""
    return _mean_over_tokens(overlap(ids[:, 1:], ids[:, :-1]) for ids in (r.selected for r in routings))


def lookahead(routings: Sequence[Routing], routers: Routers, ahead: int) -> Floats:
    """How many selected experts the routers `ahead` layers up name from this layer's input, [n_layer - ahead]."""
    n_layer = len(routers.weights)
    per_layer = []
    for layer in range(n_layer - ahead):
        overlaps = (
            overlap(r.selected[layer + ahead], best(routers.logits(layer + ahead, r.inputs[layer]), r.n_used))
            for r in routings
        )
        per_layer.append(float(np.mean(np.concatenate(list(overlaps)))))
    return np.array(per_layer, np.float32)


def lru_hits(routings: Sequence[Routing], n_slots: int) -> Floats:
    """How many selected experts a least-recently-used cache of `n_slots` per layer holds, [n_layer]."""
    hits = []
    for layer in range(routings[0].logits.shape[0]):
        recent: list[int] = []
        n_hits = n_selected = 0
        for ids in (row for routing in routings for row in routing.selected[layer].tolist()):
            n_hits += len(set(ids) & set(recent))
            n_selected += len(ids)
            recent = [*ids, *(expert for expert in recent if expert not in ids)][: max(n_slots, len(ids))]
        hits.append(n_hits / n_selected)
    return np.array(hits, np.float32)


def overlap(selected: ExpertIds, others: ExpertIds) -> Floats:
    """How many of the `selected` experts [..., n_used] are among the `others` as well, from 0 to 1, [...]."""
    return np.asarray((selected[..., :, None] == others[..., None, :]).any(axis=-1).mean(axis=-1), np.float32)


def _mean_over_tokens(parts: Iterable[np.ndarray]) -> Floats:
    means: Floats = np.concatenate(list(parts), axis=1).mean(axis=1)
    return means


def statistics(routings: Sequence[Routing], routers: Routers) -> dict[str, list[float]]:
    """All figures, a value per layer; look-ahead from a layer stands at that layer, so the last have none."""
    frequency, n_expert = frequencies(routings), routings[0].n_expert
    entropy = -(frequency * np.log(np.maximum(frequency, 1e-30))).sum(axis=1)
    first = np.concatenate([routing.expert_weights[..., 0] for routing in routings], axis=1)
    figures = {
        "busiest_share": frequency.max(axis=1),
        "busiest_in_a_text": np.mean([frequencies([routing]).max(axis=1) for routing in routings], axis=0),
        "effective_experts": np.exp(entropy),
        "first_weight": first.mean(axis=1),
        "repeat_first": first_repeats(routings),
        "repeat_selected": repeats(routings),
    }
    figures |= {f"lookahead_{ahead}": lookahead(routings, routers, ahead) for ahead in AHEAD if ahead < len(frequency)}
    slots = {share: max(1, round(share * n_expert)) for share in LRU_SHARES}
    figures |= {f"lru_{share:.0%}": lru_hits(routings, n_slots) for share, n_slots in slots.items()}
    return {name: [float(value) for value in values] for name, values in figures.items()}


@contextmanager
def opened(model: Path | None, checkpoint: Path | None, shape: str, routing: str) -> Iterator[Path]:
    """The model as a GGUF file: as it is, converted to F32, or a random one; what was made is deleted."""
    if model is not None:
        yield model
    elif checkpoint is not None:
        with tempfile.TemporaryDirectory(prefix="slimoe-routing-") as directory:
            yield convert(ConvertOptions(checkpoint, Path(directory) / "model.gguf", "F32")).path
    else:
        with random_model_file(shape, "Q4_K", routing=routing) as path:
            yield path


def read_texts(path: Path, files: Sequence[Path], routing: str, n_tokens: int) -> list[list[int]]:
    """The first `n_tokens` token ids of each file, or random ones where there is no file; raises UsageError."""
    gguf = read_gguf(path)
    if not files:
        n_vocab = gguf.tensors["token_embd.weight"].ne[1]
        return [TOKENS[routing](n_tokens, n_vocab, seed) for seed in range(1, 1 + N_RANDOM_TEXTS)]
    with closing(Tokenizer.open(gguf)) as tokenizer:
        texts = [tokenizer.encode(file.read_text("utf-8"), add_bos=True)[:n_tokens] for file in files]
    if min(map(len, texts)) < 2:
        raise UsageError("A text holds no two tokens. Name longer ones.")
    return texts


def table(figures: dict[str, list[float]]) -> Table:
    """The figures by layer, for a person; the look-ahead figures stand at the layer that looks."""
    drawn = Table("layer", *(name.replace("_", " ") for name in figures), title="Routing")
    for layer in range(max(map(len, figures.values()))):
        drawn.add_row(str(layer), *(f"{row[layer]:.3f}" if layer < len(row) else "" for row in figures.values()))
    drawn.add_row("mean", *(f"{np.mean(row):.3f}" for row in figures.values()))
    return drawn


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="A GGUF file.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A Hugging Face checkpoint.")
@click.option("--shape", type=click.Choice(MODELS), default="natural_small", show_default=True)
@click.option("--routing", type=click.Choice(list(STYLES)), default="natural", show_default=True)
@click.option("--text", "texts", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", type=click.IntRange(2), default=512, show_default=True, help="Tokens of each text.")
@threads_flag
@click.option("--smoke", is_flag=True, help="Seconds only, on the smallest random model.")
def main(
    model: Path | None,
    checkpoint: Path | None,
    shape: str,
    routing: str,
    texts: tuple[Path, ...],
    tokens: int,
    threads: int | None,
    smoke: bool,
) -> None:
    """Measure how a model chooses its experts; random tokens (--routing) where no --text is named."""
    try:
        with opened(model, checkpoint, "smoke" if smoke else shape, routing) as path:
            ids = read_texts(path, texts, routing, 64 if smoke else tokens)
            routings = observe(path, ids, threads or default_threads())
            by_layer = statistics(routings, Routers.read(path))
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    Console(stderr=True, width=160).print(table(by_layer))
    by_layer |= {old: by_layer[name] for old, name in OLD_FIGURES.items()}
    means = {name: float(np.mean(values)) for name, values in by_layer.items()}
    sizes = {"n_expert": routings[0].n_expert, "n_used": routings[0].n_used, "n_tokens": sum(map(len, ids))}
    print(json.dumps({"mean": means, "by_layer": by_layer} | sizes))


if __name__ == "__main__":
    main()
