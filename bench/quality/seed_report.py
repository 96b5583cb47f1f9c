"""The seed's table for a person, in Markdown, and its picture: KL divergence over bytes, a line for each method."""

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.quality.lab import Row
from bench.quality.seed_trials import F16, FITS_WHOLE, LLAMA_CPP, METHODS, Refusal

_INK = "#7a828c"
"""Of text and axes: legible on white and on black."""
_COLOURS = {
    LLAMA_CPP: _INK,
    "one type": "#b8860b",
    "Mixture Compressor": "#e08a1e",
    "HOBBIT": "#a8763e",
    "Layer Drop": "#ef5a3c",
    "Block Drop": "#c8434b",
    "Expert Drop, overall": "#d65db1",
    "Expert Drop, by frequency": "#b565a7",
    "Expert Drop, best subset": "#e07ab8",
    "HC-SMoE": "#9c6ade",
    "M-SMoE": "#7f74d6",
    "slimoe, merged neurons": "#7aa61c",
    "slimoe, half computed": "#4c8dff",
    "slimoe, stock": "#1a9fd0",
    "slimoe": "#3aa655",
    "slimoe, feedback": "#14924a",
}
"""Ours are cool, others' warm, llama.cpp's grey; all are legible on white and on black."""
_LINE = 0.045
"""Of the picture's height, between two names."""
_MARKERS = "osD^vP*X<>hpd"


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured of a checkpoint: rows, the sizes in bytes, and why methods have no file of a size."""

    rows: Sequence[Row]
    sizes: Sequence[int]
    bf16_bytes: int
    refusals: Sequence[Refusal] = ()

    @property
    def methods(self) -> list[str]:
        """The methods that have rows, in the order of METHODS."""
        known = {row["method"] for row in self.rows}
        return [method for method in METHODS if method in known and method != F16]

    def best(self, method: str, n_bytes: int) -> Row | None:
        """The method's file of the least divergence within so many bytes; None if none fits, or if all fit whole."""
        if self.reason(method, n_bytes) == FITS_WHOLE:
            return None
        fitting = [row for row in self._measured(method) if row["n_bytes"] <= n_bytes]
        return min(fitting, key=lambda row: float(row["kl"]), default=None)

    def reason(self, method: str, n_bytes: int) -> str:
        """Why a method has no file of a size."""
        told = [one.reason for one in self.refusals if (one.method, one.n_bytes) == (method, n_bytes)]
        rows = [row for row in self.rows if row["method"] == method]
        least = min((row["required"] for row in rows if row.get("required")), default=None)
        return told[0] if told else f"the least is {self.share(least)}" if least else ""

    def frontier(self, method: str) -> list[Row]:
        """The method's files, the smallest first, without those that lose more than a smaller one."""
        found: list[Row] = []
        for row in sorted(self._measured(method), key=lambda row: (int(row["n_bytes"]), float(row["kl"]))):
            if row["n_bytes"] <= max(self.sizes) and (not found or row["kl"] < found[-1]["kl"]):
                found.append(row)
        return found

    def share(self, n_bytes: int) -> str:
        """Bytes as a part of the checkpoint's in 16 bits."""
        return f"{round(100 * n_bytes / self.bf16_bytes, 1):g} %"

    def _measured(self, method: str) -> list[Row]:
        return [row for row in self.rows if row["method"] == method and "kl" in row]


def markdown(table: Table) -> str:
    """The divergence of each method at each size, and then all figures, size by size.

    A file that is the best of its method at a larger size too has its figures once.
    """
    return "\n".join([*_overview(table), "", *_details(table), ""])


def _overview(table: Table) -> list[str]:
    lines = [
        "| method | " + " | ".join(table.share(size) for size in table.sizes) + " |",
        "| --- |" + " --: |" * len(table.sizes),
    ]
    for method in table.methods:
        found = [table.best(method, size) for size in table.sizes]
        cells = [f"{row['kl']:.5f}" if row else "" for row in found]
        for place, size in enumerate(table.sizes):
            cells[place] = cells[place] or table.reason(method, size)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _details(table: Table) -> list[str]:
    columns = (
        *("size", "method", "file", "bytes", "KL", "same top", "worst", "cloze", "decode, F16 = 1", "memory, MB"),
        "active, M",
    )
    lines = ["| " + " | ".join(columns) + " |", "| --: | --- | --- |" + " --: |" * (len(columns) - 3)]
    whole = [row for row in table.rows if row["method"] == F16 and "kl" in row]
    lines += [_detail("", row) for row in whole]
    told = set[str]()
    for size in table.sizes:
        best = [row for method in table.methods if (row := table.best(method, size)) and row["id"] not in told]
        told |= {row["id"] for row in best}
        lines += [_detail(table.share(size), row) for row in sorted(best, key=lambda row: float(row["kl"]))]
    return lines


def _detail(size: str, row: Row) -> str:
    ratio, worst = row.get("decode_vs_f16"), max(row["perplexity_rise"].values())
    cells = (
        size,
        row["method"],
        row["name"],
        f"{row['n_bytes']:,}",
        f"{row['kl']:.5f}",
        f"{100 * row['same_top']:.1f} %",
        f"{100 * worst:+.1f} %",
        f"{100 * row['cloze'][1]:.1f} %" if row["cloze"] else "",
        f"{ratio:.2f}" if ratio else "",
        f"{row['memory'] / 1e6:.1f}",
        f"{row['active'] / 1e6:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def picture(table: Table, title: str) -> bytes:
    """The picture as SVG, the same bytes for the same figures."""
    with matplotlib.rc_context({"svg.hashsalt": "slimoe", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(9.2, 5.6), layout="constrained")
        axes = figure.subplots()
        labels, markers = [], itertools.cycle(_MARKERS)
        for method in table.methods:
            points = table.frontier(method)
            if not points:
                continue
            x, y = [100 * row["n_bytes"] / table.bf16_bytes for row in points], [row["kl"] for row in points]
            colour, width = _COLOURS[method], 2.4 if method == LLAMA_CPP or method.startswith("slimoe") else 1.3
            axes.plot(x, y, color=colour, marker=next(markers), linewidth=width, markersize=4)
            labels.append((method, x[0], y[0], colour))
        _frame(axes, title)
        _label(axes, labels)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _frame(axes: Axes, title: str) -> None:
    axes.set_yscale("log")
    axes.set_title(title, color=_INK, fontsize=11)
    axes.set_xlabel("bytes of the file, % of the model in 16 bits", color=_INK)
    axes.set_ylabel("KL divergence, nats per token (less is better)", color=_INK)
    # Names stand on the left, where lines are far apart.
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axes.tick_params(colors=_INK, which="both")
    axes.grid(color=_INK, alpha=0.2, linewidth=0.6)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("right", "bottom"))
        spine.set_color(_INK)


def _label(axes: Axes, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Names lines in a column on the left, in the order of their first points (name, x, y, colour), each tied to its.

    What begins in the right half of the picture is named there.
    """
    left, right = axes.get_xlim()
    low, high = (math.log(value) for value in axes.get_ylim())
    for name, x, y, colour in labels:
        if x > (left + right) / 2:
            axes.annotate(
                name, (x, y), xytext=(0, 7), textcoords="offset points", color=colour, fontsize=9, ha="center"
            )
    column = sorted((one for one in labels if one[1] <= (left + right) / 2), key=lambda one: one[2])
    places: list[float] = []
    for _, _, y, _ in column:
        wanted = (math.log(y) - low) / (high - low)
        places.append(max(wanted, places[-1] + _LINE) if places else wanted)
    excess = max(0.0, places[-1] - 1.0) if places else 0.0
    for (name, x, y, colour), place in zip(column, places, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(-0.02, place - excess),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            ha="right",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4, "linewidth": 0.6},
        )
