"""What it brings to divide a cache's slots between layers, in place of one pool for all: experts read per token.

Selections of every token, seen through llama.cpp, go token by token through caches of equal slots: one pool that all
layers share, as the engine has it; as many slots for each layer; and slots for each layer that read least on other
texts, found by dynamic programming (AdapMoE, arXiv 2408.10284, which takes a closed form in place of a replay). A read
is `unforeseen` if the layer's router, asked with the input of the layer before, would not have named the expert; a last
division reads fewest of these. `--simulated` takes linear routers over hidden states that drift instead of a model. The
last line of stdout is one JSON document.

    python -m bench.traces.layer_slots --model mixtral.gguf --learn calibration.txt --text news.txt
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from bench.traces.routing import ExpertIds, Routers, best, observe
from bench.traces.simulated_routers import LinearRouter, hidden_states
from slimoe.offload.cache.policy import PolicyContext, make_policy
from slimoe.offload.cache.residency import SlotCache, most_valuable
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.text.tokenizer import Tokenizer

ROOMS = (0.3, 0.5, 0.7)
N_LEARNT = 5
"""Pieces of each text that slots are divided by, whose topics may change."""
N_SIMULATED, N_SIMULATED_LAYERS, N_SIMULATED_EXPERTS = 4000, 8, 64
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Selections:
    """What each token selects, and what the layer before foretold, both [n_layer, n_tokens, n_used]; -1 is nothing."""

    selected: ExpertIds
    foretold: ExpertIds
    n_expert: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, tokens and experts that a token selects."""
        n_layer, n_tokens, n_used = self.selected.shape
        return n_layer, n_tokens, n_used

    @property
    def uses(self) -> Array:
        """How often a token selects each expert [n_layer, n_expert]."""
        n_layer, n_tokens, _ = self.shape
        counts = [np.bincount(self.selected[layer].ravel(), minlength=self.n_expert) for layer in range(n_layer)]
        return np.stack(counts) / n_tokens


def observed(model: Path, texts: Sequence[Path], n_pieces: int, n_tokens: int, n_threads: int) -> Selections:
    """Pieces of `n_tokens` of each text, evenly spread; raises SlimoeError for a file that cannot be read."""
    with closing(Tokenizer.open(read_gguf(model))) as tokenizer:
        whole = [tokenizer.encode(path.read_text("utf-8")) for path in texts]
    begins = [(text, len(text) * piece // n_pieces) for text in whole for piece in range(n_pieces)]
    tokens = [text[begin : begin + n_tokens] for text, begin in begins]
    routers, selected, foretold = Routers.read(model), [], []
    for routing in observe(model, tokens, n_threads):
        selected.append(routing.selected)
        guesses = [np.full_like(routing.selected[0], -1)]
        for layer in range(1, len(routers.weights)):
            guesses.append(best(routers.logits(layer, routing.inputs[layer - 1]), routing.n_used))
        foretold.append(np.stack(guesses))
    return Selections(np.concatenate(selected, 1), np.concatenate(foretold, 1), routers.weights.shape[1])


def simulated(seed: int, n_tokens: int) -> Selections:
    """Selections of the same routers for other hidden states."""
    rng = np.random.default_rng(1)
    routers = [LinearRouter(N_SIMULATED_EXPERTS, 8, rng) for _ in range(N_SIMULATED_LAYERS)]
    states = hidden_states(n_tokens, np.random.default_rng(seed))
    selected = np.stack([np.stack([one.route(state).experts for one in routers]) for state in states], 1)
    return Selections(selected, np.full_like(selected, -1), N_SIMULATED_EXPERTS)


def reads(tokens: Selections, slots: int | Sequence[int], uses: Array) -> tuple[Array, Array]:
    """Experts read per token of each layer, and those of them that are unforeseen, both [n_layer].

    `slots` is what all layers share, or what each has; `uses` is known beforehand.
    """
    n_layer, n_tokens, n_used = tokens.shape
    policy = make_policy("lfu-decay", PolicyContext(n_layer, tokens.n_expert, n_used, uses))
    keys = [[(layer, expert) for expert in range(tokens.n_expert)] for layer in range(n_layer)]
    if isinstance(slots, int):
        caches, of_cache = [SlotCache(slots, policy)] * n_layer, [[key for own in keys for key in own]]
    else:
        caches, of_cache = [SlotCache(n, policy) for n in slots], keys
    for cache, own in zip(caches, of_cache, strict=False):
        for key in most_valuable(policy.values, own, cache.n_slots):
            cache.acquire(key)
    n_read, n_unforeseen = np.zeros((2, n_layer))
    for token in range(n_tokens):
        for layer, cache in enumerate(caches):
            experts = tokens.selected[layer, token].tolist()
            policy.decode(layer, experts)
            pinned, foretold = {(layer, expert) for expert in experts}, set(tokens.foretold[layer, token].tolist())
            for expert in experts:
                if (layer, expert) not in cache:
                    n_read[layer] += 1
                    n_unforeseen[layer] += expert not in foretold
                    cache.acquire((layer, expert), pinned)
        policy.end_token()
    return n_read / n_tokens, n_unforeseen / n_tokens


def divided(costs: Array, n_slots: int) -> tuple[int, ...]:
    """The slots of each layer, all in use, whose costs [n_layer, n] with n slots add up to least.

    Infinite costs are no choice.
    """
    found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for of_layer in costs:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for taken, (cost, slots) in found.items():
            for n in np.flatnonzero(np.isfinite(of_layer)).tolist():
                sum_of = cost + float(of_layer[n])
                if taken + n <= n_slots and sum_of < longer.get(taken + n, (np.inf, ()))[0]:
                    longer[taken + n] = sum_of, (*slots, n)
        found = longer
    return found[max(found)][1]


def rows(learnt: Selections, tried: Selections, rooms: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Rows of each division, with slots for a part of all experts."""
    (n_layer, _, n_used), n_expert, uses = tried.shape, tried.n_expert, learnt.uses
    costs = np.full((2, n_layer, n_expert + 1), np.inf)
    for n in range(n_used, n_expert + 1):
        costs[:, :, n] = reads(learnt, [n] * n_layer, uses)
    for room in rooms:
        n_slots = max(n_used * n_layer, int(room * n_layer * n_expert))
        ways: dict[str, int | Sequence[int]] = {
            "shared": n_slots,
            "even": [n_slots // n_layer + (layer < n_slots % n_layer) for layer in range(n_layer)],
            "least reads": divided(costs[0], n_slots),
            "least unforeseen": divided(costs[1], n_slots),
        }
        shared = None
        for name, slots in ways.items():
            n_read, n_unforeseen = (float(part.sum()) for part in reads(tried, slots, uses))
            shared = shared or (n_read, n_unforeseen)
            row = {"room": room, "name": name, "slots": slots, "reads": n_read, "unforeseen": n_unforeseen}
            yield row | {"reads_ratio": n_read / shared[0], "unforeseen_ratio": n_unforeseen / shared[1]}


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="A GGUF file that llama.cpp loads.")
@click.option("--learn", type=click.Path(exists=True, path_type=Path), multiple=True, help="Text to divide slots by.")
@click.option(
    "--text", "texts", type=click.Path(exists=True, path_type=Path), multiple=True, help="Text to try them on."
)
@click.option(
    "--tokens", type=click.IntRange(2), default=1536, show_default=True, help="Tokens of each text, or piece."
)
@click.option("--simulated", "is_simulated", is_flag=True, help="Linear routers over random hidden states.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--smoke", is_flag=True, help="Seconds only: few tokens of simulated routers.")
def main(
    model: Path | None,
    learn: tuple[Path, ...],
    texts: tuple[Path, ...],
    tokens: int,
    is_simulated: bool,
    threads: int,
    smoke: bool,
) -> None:
    """Try divisions of a cache's slots between layers."""
    console, found = Console(stderr=True, width=120), []
    try:
        if smoke or is_simulated:
            n_tokens, rooms = (5, (0.9,)) if smoke else (N_SIMULATED, ROOMS)
            learnt, tried = (simulated(seed, n_tokens) for seed in (5, 6))
        elif model is None or not learn or not texts:
            raise UsageError("Name --model, at least one --learn and one --text, or --simulated.")
        else:
            rooms = ROOMS
            learnt = observed(model, learn, N_LEARNT, tokens, threads)
            tried = observed(model, texts, 1, tokens, threads)
        for row in rows(learnt, tried, rooms):
            found.append(row)
            reads_of, unforeseen_of = (row[f"{name}_ratio"] - 1 for name in ("reads", "unforeseen"))
            console.print(
                f"room {row['room']:g}, {row['name']}: {row['reads']:.2f} reads per token ({reads_of:+.1%}), "
                f"{row['unforeseen']:.2f} unforeseen ({unforeseen_of:+.1%})",
                markup=False,
            )
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    print(json.dumps({"rows": found, "n_tokens": tried.shape[1], "n_expert": tried.n_expert}))


if __name__ == "__main__":
    main()
