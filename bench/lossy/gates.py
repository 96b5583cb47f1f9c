"""What rules that save on selected experts cost where all of them save as much: in torch, on windows of texts.

Part `protection`: experts are skipped whose weight is below the layer's own ratio to the token's largest (NAEE, and
MC's ODP), and the 2 % of a window's tokens that matter most keep all of theirs (ODP's token protection); as many
experts are skipped in all. Tokens matter by ODP's formula, the sum of a token's absolute hidden states times the
attention that it gets, per token that could pay it; by parts of this formula; by their place; or at random. Everywhere,
or in the first half of windows alone, as in a prompt. Part `gates`: a file of two copies of each expert uses low-bit
ones behind one threshold of the weights before an expert (HOBBIT), or below thresholds of the layers' or the experts'
own, which `slimoe convert` finds. The divergence is from the checkpoint, and from the rule that saves nothing. The last
line of stdout is one JSON document.

    python -m bench.lossy.gates --checkpoint ~/mixtral --stats STATS --text news=news.txt
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from bench.limits import machine
from bench.lossy.gated_experts import Rule, Saved, Selected, nothing, run_gated
from bench.quality.lab import read_windows
from bench.quality.lab_flags import LabFlags, lab_flags
from bench.quality.smoke_model import smoke_model
from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.forward.head import read_head
from slimoe.converter.forward.tensor_source import TensorSource
from slimoe.converter.forward.windows import Windows, cut_windows
from slimoe.converter.methods.layer_hints import price_of_bytes, skip_ratio
from slimoe.converter.methods.layer_weight import trace_of
from slimoe.converter.recipe.recipe import Recipe, StorageRecipe
from slimoe.converter.report.evaluation import divergences
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.statistics_file import load_statistics
from slimoe.converter.write.writer import write_planned
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.lossy.loss import LossTable, loss_tables
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import plan_engine

PARTS = ("protection", "gates")
IMPORTANCE = ("odp", "attention", "norm", "first", "random")
PROTECTED = 0.02
SAVED = (0.33, 0.5)
"""Of the bytes that low-bit copies could save."""
COPIES = StorageRecipe(expert="Q4_K", low="Q2_K")
Array = NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scored:
    """KL divergences in nats of each scored token from two references, the checkpoint and a rule that saves nothing."""

    from_checkpoint: NDArray[np.float32]
    own: NDArray[np.float32]


class Texts:
    """Windows of texts, and what a checkpoint and the best copies of a model predict there."""

    def __init__(self, source: ModelSource, copies: tuple[ModelSource, ...], windows: Windows) -> None:
        self.windows, self._rows = windows, torch.from_numpy(windows.rows)
        self.copies = tuple(map(TensorSource, copies))
        expected = TensorSource(source)
        self._head, self._own_head = read_head(expected), read_head(self.copies[0])
        self._expected = run_gated([expected], windows.sequences, nothing)[self._rows]
        self._best = run_gated(self.copies, windows.sequences, nothing)[self._rows]

    def score(self, rule: Rule) -> Scored:
        """Divergences of what the rule computes."""
        found = run_gated(self.copies, self.windows.sequences, rule)[self._rows]
        return Scored(
            divergences(self._head, self._expected, self._own_head, found),
            divergences(self._own_head, self._best, self._own_head, found),
        )

    def row(self, scored: Scored, other: Scored) -> Row:
        """Means, and the ratio to another rule's own divergence with its standard error over windows."""
        rise, owners = scored.own - other.own, self.windows.owners
        by_window = np.array([rise[owners == owner].mean() for owner in np.unique(owners)])
        return {
            "kl": float(scored.from_checkpoint.mean()),
            "kl_own": float(scored.own.mean()),
            "ratio": float(scored.own.mean() / other.own.mean()),
            "ratio_error": float(by_window.std() / len(by_window) ** 0.5 / other.own.mean()),
        }


class SkipSmall:
    """Skips experts whose weight is below the layer's ratio to the token's largest, in some of each window's tokens.

    With a `kind` of importance the tokens that matter most keep all of their experts, and as many experts are skipped
    in their stead, those whose weights are smallest next to their tokens' largest.
    """

    def __init__(self, windows: Windows, ratios: list[float], share: float, kind: str | None) -> None:
        self._spans, self._ratios, self._kind = list(windows.sequences.spans()), ratios, kind
        self._places = torch.cat([torch.arange(end - begin) for begin, end in self._spans])
        self._lengths = torch.cat([torch.full((end - begin,), end - begin) for begin, end in self._spans])
        self._area = self._places < share * self._lengths
        self.n_skipped = 0

    def __call__(self, selected: Selected) -> Saved:
        """Decides for a layer."""
        parts = selected.weights / selected.weights.amax(1, keepdim=True)
        may = self._area[:, None] & (parts < 1)
        skipped = may & (parts < self._ratios[selected.layer])
        if self._kind is not None:
            scores, n_skipped = self._scores(self._kind, selected), int(skipped.sum())
            for begin, end in self._spans:
                n_protected = max(1, round(PROTECTED * (end - begin)))
                may[begin + scores[begin:end].topk(n_protected).indices] = False
            order = parts.masked_fill(~may, 2.0).flatten().topk(n_skipped, largest=False).indices
            skipped = torch.zeros(parts.numel(), dtype=torch.bool).index_fill(0, order, value=True).view_as(may)
        self.n_skipped += int(skipped.sum())
        return Saved(skipped, torch.zeros_like(skipped))

    def _scores(self, kind: str, selected: Selected) -> Tensor:
        norms, seers = selected.hidden.abs().sum(1), self._lengths - self._places
        return {
            "odp": norms * selected.received / seers,
            "attention": selected.received / seers,
            "norm": norms,
            "first": -self._places.float(),
            "random": torch.rand(len(norms), generator=torch.Generator().manual_seed(selected.layer)),
        }[kind]


def protection(texts: Texts, statistics: Statistics) -> Iterator[Row]:
    """Rows of skipping without and with protected tokens, everywhere and in the first halves of windows alone."""
    ratios = [0.0 if one.router is None else skip_ratio(one.router) for one in statistics.layers]
    n_selections = texts.windows.sequences.n_rows * sum(one.router is not None for one in statistics.layers)
    for where, share in (("everywhere", 1.0), ("first halves", 0.5)):
        plain = None
        for kind in (None, *IMPORTANCE):
            rule = SkipSmall(texts.windows, ratios, share, kind)
            scored = texts.score(rule)
            plain = plain or scored
            name = "skip" if kind is None else f"skip, protected by {kind}"
            row = {"name": name, "where": where, "skipped_per_token": rule.n_skipped / n_selections}
            yield row | texts.row(scored, plain)


class LowBelow:
    """Uses low-bit copies of experts behind others of more than a part `limit` of the token's weights.

    Where `limit` has a weight for each expert of each layer, of those with less. `saved` [n_stored] are the bytes that
    each low-bit copy has fewer, by layer.
    """

    def __init__(self, limit: float | list[Array], saved: list[Array]) -> None:
        self._limit, self._saved, self.n_bytes, self.n_most = limit, saved, 0.0, 0.0

    def __call__(self, selected: Selected) -> Saved:
        """Decides for a layer."""
        weights, experts = selected.weights, selected.experts
        if isinstance(self._limit, float):
            low = (weights.cumsum(1) - weights) / weights.sum(1, keepdim=True) > self._limit
        else:
            low = weights < torch.from_numpy(self._limit[selected.layer])[experts]
        own = torch.from_numpy(self._saved[selected.layer])[experts]
        self.n_bytes += (low * own).sum().item()
        self.n_most += own.sum().item()
        return Saved(torch.zeros_like(low), low)


def gates(texts: Texts, statistics: Statistics, tables: list[LossTable], saved: list[Array]) -> Iterator[Row]:
    """Rows of low-bit copies by one threshold, by the layers' and by the experts' own, at the same bytes.

    All thresholds are found on the calibration's tokens. `saved` is as in `LowBelow`.
    """
    traces = [trace_of(one) for one in statistics.layers]
    weights, experts = [np.float64(one.shares) for one in traces], [one.picks.astype(int) for one in traces]
    squares = [table.use[:-1] * table.weight_square[:-1] for table in tables]
    by_layer = [np.full(len(n), (t.low[:-1] * n).sum() / n.sum()) for t, n in zip(tables, squares, strict=True)]
    rates = {"layer": by_layer, "expert": [table.low[:-1] for table in tables]}
    all_saved = np.concatenate([n[e].ravel() for n, e in zip(saved, experts, strict=True)])
    before = np.concatenate([((w.cumsum(1) - w) / w.sum(1, keepdims=True)).ravel() for w in weights])
    order = np.argsort(-before)
    for part in SAVED:
        at, plain = int(np.searchsorted(all_saved[order].cumsum(), part * all_saved.sum())), None
        limits: dict[str, float | list[Array]] = {"one threshold": float(before[order[at]])}
        for name, own in rates.items():
            losses = np.concatenate([(r[e] * w**2).ravel() for r, e, w in zip(own, experts, weights, strict=True)])
            price = price_of_bytes(losses, all_saved, part)
            limits[name] = [np.sqrt(price * n / np.maximum(r, 1e-30)) for n, r in zip(saved, own, strict=True)]
        for name, limit in limits.items():
            rule = LowBelow(limit, saved)
            scored = texts.score(rule)
            plain = plain or scored
            yield {"name": f"low by {name}", "saved": rule.n_bytes / rule.n_most} | texts.row(scored, plain)


def measure(
    source: ModelSource, statistics: Statistics, windows: Windows, parts: tuple[str, ...], path: Path
) -> Iterator[Row]:
    """All rows; a file is written to `path`. Raises as `plan_compression` does."""
    if "protection" in parts:
        yield from protection(Texts(source, (source,), windows), statistics)
    if "gates" in parts:
        plan = plan_compression(source, statistics, Recipe(types=COPIES, hints=True))
        write_planned(source, plan, path, statistics)
        layers = plan_engine(EngineConfig(path)).layers
        tables = [table for table in loss_tables(layers) if table is not None]
        if len(tables) < len(layers):
            raise UsageError("The gates part needs experts in every layer.")
        saved = [np.array([c[0].n_bytes - c[-1].n_bytes for c in one.experts], float) for one in layers if one]
        copies = gguf_source(path), gguf_source(path, copy=1)
        yield from gates(Texts(source, copies, windows), statistics, tables, saved)


@click.command()
@lab_flags(4)
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS, show_default=True)
def main(
    parts: tuple[str, ...],
) -> None:
    """Measure what saving on selected experts costs, by several rules that save as much."""
    flags = LabFlags.told()
    console, found = Console(stderr=True, width=120), list[Row]()
    torch.set_num_threads(flags.n_threads)
    try:
        with tempfile.TemporaryDirectory(prefix="slimoe-gates-") as name:
            if flags.is_smoke:
                source, statistics, reference = smoke_model(Path(name) / "checkpoint", types=("Q2_K", "Q4_K"))
                cut = reference.windows
            else:
                checkpoint, stats = flags.paths()
                source = open_source(checkpoint)
                statistics = load_statistics(stats, source)
                cut = cut_windows(read_windows(source, flags.texts, flags.n_windows))
            for row in measure(source, statistics, cut, parts, Path(name) / "copies.gguf"):
                found.append(row)
                about = f"{row['where']}, {row['skipped_per_token']:.2f} skipped" if "where" in row else ""
                about = about or f"{row['saved']:.1%} of the bytes"
                console.print(
                    f"{row['name']} ({about}): KL {row['kl']:.5f}, own {row['kl_own']:.5f}, ratio {row['ratio']:.3f} ± "
                    f"{row['ratio_error']:.3f}",
                    markup=False,
                )
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    print(
        json.dumps(
            {"rows": found, "texts": list(flags.texts), "n_windows": flags.n_windows, "machine": machine.describe()}
        )
    )


if __name__ == "__main__":
    main()
