"""Draws the report's pictures, as PNG, with matplotlib, which only the extra `convert` installs."""

from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from slimoe.converter.report.block_facts import PARTS
from slimoe.converter.report.report import Report

_DPI = 110
_MANY_COLUMNS = 16
"""The number of columns of a map beyond which its cells are too narrow for numbers."""
_COLOURS = {"attention": "#4c72b0", "experts": "#dd8452", "second copies": "#eebb99", "other": "#8c8c8c"}
_CONSTANT, _GONE = "#b07aa1", "#e8e8e8"
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def draw_plots(report: Report) -> dict[str, tuple[str, bytes]]:
    """Draws the pictures that the report has figures for: names of PNG files and their bytes, by section."""
    drawn = {}
    for title, (name, draw) in PLOTS.items():
        figure = draw(report)
        if figure is not None:
            picture = BytesIO()
            figure.savefig(picture, dpi=_DPI, format="png")
            drawn[title] = (f"{name}.png", picture.getvalue())
    return drawn


def bytes_by_layer(report: Report) -> Figure:
    """Draws the bytes of each block's parts as stacked bars."""
    blocks = [facts.block for facts in report.blocks]
    largest = max(sum(facts.n_bytes.values()) for facts in report.blocks)
    unit, size = next(((unit, size) for unit, size in _UNITS if largest >= size), ("bytes", 1))
    figure, axes = _figure(_width(len(blocks)), 3.2)
    below = np.zeros(len(blocks))
    for part in PARTS:
        values = np.array([facts.n_bytes[part] / size for facts in report.blocks])
        if values.any():
            axes.bar(blocks, values, bottom=below, color=_COLOURS[part], label=part)
        below += values
    axes.set(xlabel="block of the source", ylabel=unit, title="Bytes by layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small")
    return figure


def type_map(report: Report) -> Figure | None:
    """Draws the bits per weight of the expert that each row of the source's routers means."""
    n_columns = max(len(facts.rows) for facts in report.blocks)
    if not n_columns:
        return None
    bits, other = (np.full((len(report.blocks), n_columns), np.nan) for _ in range(2))
    for line, facts in enumerate(report.blocks):
        for column, row in enumerate(facts.rows):
            bits[line, column] = np.nan if row.bits is None else row.bits
            other[line, column] = np.nan if row.bits is not None else float(row.is_constant)
    figure, axes = _map(bits, "bits per weight", [facts.block for facts in report.blocks], "{:.1f}")
    axes.imshow(np.ma.masked_invalid(other), cmap=ListedColormap([_GONE, _CONSTANT]), vmin=0, vmax=1, aspect="auto")
    found = {bool(value) for value in other[np.isfinite(other)]}
    labels = {False: (_GONE, "dropped"), True: (_CONSTANT, "constant")}
    legend = [Patch(color=labels[one][0], label=labels[one][1]) for one in sorted(found)]
    if legend:
        figure.legend(handles=legend, fontsize="small", loc="outside lower left", ncols=2)
    axes.set_title("Types of experts")
    return figure


def use_map(report: Report) -> Figure | None:
    """Draws how often each row of a layer's router was selected in the calibration, in percent of the layer's total."""
    selections = report.coverage.selections if report.coverage else ()
    n_columns = max((len(row) for row in selections if row is not None), default=0)
    if not n_columns:
        return None
    parts = np.full((len(selections), n_columns), np.nan)
    for line, row in enumerate(selections):
        if row is not None:
            parts[line, : len(row)] = 100 * np.array(row) / max(1, sum(row))
    figure, axes = _map(parts, "% of the layer's selected experts", range(len(selections)), "{:.0f}")
    axes.set_title("Use of experts in the calibration")
    return figure


def kl_by_layer(report: Report) -> Figure | None:
    """Draws the KL divergence of each block's changes alone, and the part of its selected experts that changed."""
    flips = np.array([np.nan if one is None else 100 * one for one in report.quality.flips])
    if report.block_kl is None and np.isnan(flips).all():
        return None
    figure = Figure(figsize=(_width(len(flips)), 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    if report.block_kl is not None:
        above.bar(range(len(flips)), report.block_kl, color=_COLOURS["attention"])
    above.set(ylabel="nats per token", title="KL divergence of each block's changes alone")
    below.bar(range(len(flips)), flips, color=_COLOURS["experts"])
    below.set(xlabel="block of the source", ylabel="% of selected experts", title="Selected experts that changed")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


PLOTS: dict[str, tuple[str, Callable[[Report], Figure | None]]] = {
    "Damage by layer": ("kl-by-layer", kl_by_layer),
    "Calibration": ("expert-use", use_map),
    "Bytes": ("bytes-by-layer", bytes_by_layer),
    "Types": ("type-map", type_map),
}
"""The name of the picture's file and the function that draws it, by section of the report."""


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _width(n_bars: int) -> float:
    return min(14.0, max(5.0, 0.22 * n_bars + 2.0))


def _map(values: NDArray[np.float64], label: str, names: Sequence[int], number: str) -> tuple[Figure, Axes]:
    """Draws a map with layers downwards and experts to the right, with numbers in the cells if they are wide enough."""
    n_lines, n_columns = values.shape
    is_wide = n_columns > _MANY_COLUMNS
    width = min(16.0, max(4.5, (0.11 if is_wide else 0.5) * n_columns + 2.2))
    figure, axes = _figure(width, min(14.0, max(2.5, 0.24 * n_lines + 1.4)))
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label=label)
    axes.set(xlabel="expert of the source", ylabel="block of the source")
    step = max(1, n_lines // 32)
    axes.set_yticks(range(0, n_lines, step), [str(name) for name in names][::step], fontsize=7)
    if not is_wide:
        axes.set_xticks(range(n_columns))
        middle = (np.nanmin(values) + np.nanmax(values)) / 2 if np.isfinite(values).any() else 0.0
        for (line, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if value > middle else "white"
                axes.text(column, line, number.format(value), ha="center", va="center", fontsize=6, color=colour)
    return figure, axes
