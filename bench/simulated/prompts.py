"""Prompts on simulated machines: which of the experts that a device lacks it gets copied for a batch.

Never: the CPU computes them. Always: all are copied, each computed while the next is on its way. Chosen: those that the
engine's own rule picks, by what it would have measured. Op offload is llama.cpp's: the experts of whole layers stay in
host memory, and from 32 tokens on a layer's are copied, then computed. Machines are those of the grid
(`bench.simulated.grid`) with the arithmetic of their processors, which an expert with many tokens is bound by; that
link and CPU share a memory is left out. The table goes to stderr, the last line of stdout is one JSON document.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product

import click
import numpy as np

from bench.simulated.caches import most_used
from bench.simulated.grid import DEVICES, HOSTS, LINKS, MODELS, TINY, Model
from bench.simulated.machine import Machine
from slimoe.offload.experts.device_watch import TIMED_TOKENS
from slimoe.offload.machine.cost_model import expected_uses
from slimoe.offload.machine.expert_times import ExpertTimes, LinkTimes, choose_streams

TERA = 1e12
HOST_FLOPS = {"DDR4": 0.7 * TERA, "DDR5": 2 * TERA, "DDR5, few cores": 1 * TERA}
DEVICE_FLOPS = {"8 GiB": 20 * TERA, "12 GiB": 40 * TERA, "24 GiB": 80 * TERA}
"""What products with Q4_K reach of them, not what is advertised."""
LENGTHS = 8, 16, 32, 64, 128, 256, 512
OFFLOADED_FROM = 32
"""Tokens from which llama.cpp copies."""
_FLOPS_PER_BYTE = 2 * 256 / 144
WAYS = "never", "always", "chosen", "op offload"


@dataclass(frozen=True, slots=True)
class Side:
    """A processor: seconds of an expert are those of reading it, or of its arithmetic if that takes longer."""

    bytes_per_second: float
    flops: float

    def seconds(self, n_bytes: float, n_tokens: int) -> float:
        """Seconds for an expert and the tokens that it meets."""
        return max(n_bytes / self.bytes_per_second, _FLOPS_PER_BYTE * n_bytes * n_tokens / self.flops)

    def measured(self, n_bytes: float) -> ExpertTimes:
        """What the engine measures."""
        return ExpertTimes(TIMED_TOKENS, tuple(self.seconds(n_bytes, n_tokens) for n_tokens in TIMED_TOKENS))


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds of a prompt by way; `n_copied` experts per layer were chosen."""

    model: str
    texts: str
    device: str
    host: str
    link: str
    n_tokens: int
    seconds: dict[str, float]
    n_copied: float


def streamed(there: Sequence[float], copied: Sequence[float], copy: float) -> float:
    """Seconds until a device has computed what is `there`, and what is `copied`: each while the next is on its way."""
    computed = sum(there)
    for number, seconds in enumerate(copied, 1):
        computed = max(computed, number * copy) + seconds
    return computed


def rows(model: Model, texts: str, device: str, host: str, link: str, seed: int = 1) -> list[Row]:
    """A machine's prompts of all lengths."""
    n_bytes = model.expert_bytes
    routing = model.routing(texts, max(LENGTHS), seed)
    uses = expected_uses(routing.likings, model.n_layer, model.n_expert, model.n_used)
    vram, device_rate = DEVICES[device]
    n_slots = model.n_slots(vram)
    is_here = most_used(uses, n_slots)
    n_whole = n_slots // model.n_expert  # layers whose experts are all there, as llama.cpp places them
    machine = Machine(device_rate, *HOSTS[host], LINKS[link])
    card, cpu = Side(device_rate, DEVICE_FLOPS[device]), Side(HOSTS[host][0], HOST_FLOPS[host])
    copy = machine.copy_seconds(n_bytes)
    times = LinkTimes(cpu.measured(n_bytes), card.measured(n_bytes), copy, is_apart=True)
    found = []
    for n_tokens in LENGTHS:
        dense = model.n_layer * card.seconds(model.layer_bytes, n_tokens)
        taken, n_copied = dict.fromkeys(WAYS, dense), 0
        for layer in range(model.n_layer):
            experts, counts = np.unique(routing.selected[:n_tokens, layer], return_counts=True)
            at = is_here[layer, experts]
            here, absent = counts[at].tolist(), sorted(counts[~at].tolist(), reverse=True)
            there = [card.seconds(n_bytes, n) for n in here]
            on_card, on_cpu = ([side.seconds(n_bytes, n) for n in absent] for side in (card, cpu))
            chosen = set(choose_streams(absent, here, times))
            left = sum(seconds for number, seconds in enumerate(on_cpu) if number not in chosen)
            n_copied += len(chosen)
            taken["never"] += max(sum(there), sum(on_cpu))
            taken["always"] += streamed(there, on_card, copy)
            taken["chosen"] += max(left, streamed(there, [on_card[number] for number in sorted(chosen)], copy))
            every = counts.tolist()
            if layer < n_whole or n_tokens >= OFFLOADED_FROM:
                copies = 0.0 if layer < n_whole else len(every) * copy
                taken["op offload"] += copies + sum(card.seconds(n_bytes, n) for n in every)
            else:
                taken["op offload"] += sum(cpu.seconds(n_bytes, n) for n in every)
        found.append(Row(model.name, texts, device, host, link, n_tokens, taken, n_copied / model.n_layer))
    return found


def table(found: Sequence[Row]) -> str:
    """Markdown: each way's time over the chosen one's, from least to most, by model, device and length."""
    lines = [
        "| model, device | tokens | copied per layer | never, over chosen | always | op offload |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for model, device in dict.fromkeys((row.model, row.device) for row in found):
        for n_tokens in LENGTHS:
            own = [row for row in found if (row.model, row.device, row.n_tokens) == (model, device, n_tokens)]
            cells = [f"{min(row.n_copied for row in own):.1f} to {max(row.n_copied for row in own):.1f}"]
            for way in (way for way in WAYS if way != "chosen"):
                ratios = [row.seconds[way] / row.seconds["chosen"] for row in own]
                cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
            lines.append(f"| {model}, {device} | {n_tokens} | {' | '.join(cells)} |")
    return "\n".join(lines)


def as_json(found: Sequence[Row]) -> dict[str, object]:
    """The least of each way's time over the chosen one's, over all rows, and the rows."""
    worst = {way: min(row.seconds[way] / row.seconds["chosen"] for row in found) for way in WAYS if way != "chosen"}
    ratios = {f"chosen_vs_{way.replace(' ', '_')}": ratio for way, ratio in worst.items()}
    return {**ratios, "rows": [asdict(row) for row in found]}


@click.command()
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the made-up routing.")
@click.option("--smoke", is_flag=True, help="Seconds only, a tiny model.")
def main(seed: int, smoke: bool) -> None:
    """Play prompts on simulated machines."""
    found = []
    for model, device in product((TINY,) if smoke else MODELS, DEVICES):
        if not model.n_used * 2 <= model.n_slots(DEVICES[device][0]) < model.n_layer * model.n_expert:
            continue
        for texts, host, link in product(model.texts, HOSTS, LINKS):
            found += rows(model, texts, device, host, link, seed)
        print(f"{model.name}, {device}", file=sys.stderr, flush=True)
    print(table(found), file=sys.stderr)
    print(json.dumps(as_json(found)))


if __name__ == "__main__":
    main()
