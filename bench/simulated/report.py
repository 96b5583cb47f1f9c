"""What the grid of simulated machines came to: a table for a person, and a picture of every cell."""

import io
from collections.abc import Sequence
from itertools import groupby

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.simulated.grid import ENGINE, ENGINE_UNIFORM, STATIC, Cell

_INK = "#808080"
"""Readable on white and on black."""


def worst(cells: Sequence[Cell], *, calibrated: bool) -> tuple[float, float]:
    """The engine's greatest time over static placement's, and the least of the best other way's time over its own."""
    to_static = max(cell.to_static(calibrated=calibrated) for cell in cells)
    return to_static, min(cell.of_best(calibrated=calibrated) for cell in cells)


def table(cells: Sequence[Cell]) -> str:
    """A Markdown table with a row for each model, device and kind of texts, over all hosts and links."""
    lines = [
        "| model, device | experts there | texts | static, ms | slimoe over static | best other over slimoe | "
        "over the oracle | without calibration: over static | best other over slimoe | choices |",
        "| --- | --: | --- | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for (model, device, texts, n_slots), rows in groupby(cells, lambda c: (c.model, c.device, c.habits, c.n_slots)):
        own = list(rows)
        modes = [cell.mode for cell in own]
        cells_of_row = (
            f"{model}, {device}",
            str(n_slots),
            texts,
            _range([cell.ms[STATIC] for cell in own], "g"),
            _range([cell.to_static(calibrated=True) for cell in own]),
            _range([cell.of_best(calibrated=True) for cell in own]),
            _range([cell.to_oracle for cell in own]),
            _range([cell.to_static(calibrated=False) for cell in own]),
            _range([cell.of_best(calibrated=False) for cell in own]),
            ", ".join(f"{modes.count(mode)} {mode}" for mode in sorted(set(modes))),
        )
        lines.append("| " + " | ".join(cells_of_row) + " |")
    return "\n".join(lines)


def _range(values: Sequence[float], style: str = "") -> str:
    low, high = min(values), max(values)
    return f"{low:.3g} to {high:.3g}" if style else f"{low:.2f} to {high:.2f}"


def picture(cells: Sequence[Cell]) -> bytes:
    """Every cell as SVG, the same bytes for the same figures: how many times faster the engine is.

    Above than static placement, below than the best way that does not know the future.
    """
    rows = list(dict.fromkeys((cell.model, cell.device) for cell in cells))
    columns = list(dict.fromkeys((cell.habits, cell.host, cell.link) for cell in cells))
    to_static, of_best = (np.full((len(rows), len(columns)), np.nan) for _ in range(2))
    for cell in cells:
        at = rows.index((cell.model, cell.device)), columns.index((cell.habits, cell.host, cell.link))
        to_static[at], of_best[at] = 1 / cell.to_static(calibrated=True), cell.of_best(calibrated=True)
    with matplotlib.rc_context({"svg.hashsalt": "slimoe", "svg.fonttype": "none", "font.size": 7}):
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        _heat(above, to_static, rows, "times as fast as experts that stay on the card")
        _heat(below, of_best, rows, "times as fast as the best of nine other ways")
        below.set_xticks(range(len(columns)), [link for _, _, link in columns], rotation=90, color=_INK)
        for begin, (texts, host) in _groups(columns):
            above.text(begin, -0.75, f"{texts}, {host}", color=_INK, fontsize=7)
        below.set_xlabel("PCI Express", color=_INK)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _groups(columns: Sequence[tuple[str, str, str]]) -> list[tuple[float, tuple[str, str]]]:
    begins: dict[tuple[str, str], float] = {}
    for number, (texts, host, _) in enumerate(columns):
        begins.setdefault((texts, host), number - 0.5)
    return [(begin, name) for name, begin in begins.items()]


def _heat(axes: Axes, values: np.ndarray, rows: Sequence[tuple[str, str]], title: str) -> None:
    axes.imshow(np.log2(values), cmap="PiYG", vmin=-1, vmax=1, aspect="auto")
    axes.set_ylabel(title, color=_INK)
    axes.set_yticks(range(len(rows)), [f"{model}, {device}" for model, device in rows], color=_INK)
    axes.tick_params(colors=_INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for row, column in np.ndindex(values.shape):
        if np.isfinite(values[row, column]):
            axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=5.5)


def as_json(cells: Sequence[Cell]) -> dict[str, object]:
    """All figures of all cells, and the worst ones."""
    (static, best), (blind_static, blind_best) = (worst(cells, calibrated=known) for known in (True, False))
    return {
        "cells": [
            {
                "model": cell.model,
                "texts": cell.habits,
                "device": cell.device,
                "host": cell.host,
                "link": cell.link,
                "experts_on_device": cell.n_slots,
                "ms_per_token": {name: round(ms, 3) for name, ms in cell.ms.items()},
                "mode": cell.mode,
                "reason": cell.choice,
            }
            for cell in cells
        ],
        "worst_over_static": static,
        "worst_of_best": best,
        "uniform_worst_over_static": blind_static,
        "uniform_worst_of_best": blind_best,
        "engine": [ENGINE, ENGINE_UNIFORM],
    }
