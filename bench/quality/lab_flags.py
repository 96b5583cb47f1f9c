"""Flags that benches of a model's quality share: its checkpoint, statistics and texts, and windows of these."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from bench.quality.lab import Lab
from slimoe.offload.errors import UsageError
from slimoe.offload.resources.processors import default_threads
from slimoe.server.options.flag_group import FlagGroup, flag_group

_META = "bench.lab."


@dataclass(frozen=True, slots=True)
class LabFlags:
    """What a bench is told of its model: paths, `texts` as [NAME=]FILE, and how many windows of each; or `is_smoke`."""

    checkpoint: Path | None
    stats: Path | None
    texts: tuple[str, ...]
    n_windows: int
    n_threads: int
    is_smoke: bool

    @classmethod
    def told(cls) -> "LabFlags":
        """What the command that is running was told."""
        meta = click.get_current_context().meta
        names = ("checkpoint", "stats", "texts", "windows", "threads", "smoke")
        checkpoint, stats, texts, windows, threads, smoke = (meta[f"{_META}{name}"] for name in names)
        return cls(checkpoint, stats, texts, windows, threads or default_threads(), smoke)

    def paths(self) -> tuple[Path, Path]:
        """The checkpoint and its statistics; raises UsageError where they, or texts, are not named."""
        if self.checkpoint is None or self.stats is None or not self.texts:
            raise UsageError("Name --checkpoint, --stats and at least one --text, or --smoke.")
        return self.checkpoint, self.stats

    def lab(self, directory: Path, *, feedback: bool = True) -> Lab:
        """Opens them, with room for files in `directory`; raises SlimoeError."""
        return Lab.open(*self.paths(), self.texts, self.n_windows, directory, self.n_threads, feedback=feedback)


def lab_flags(n_windows: int) -> FlagGroup:
    """The flags, with so many windows where nothing is said; what they say is left to `LabFlags.told`."""
    path, noted = click.Path(path_type=Path), partial(click.option, expose_value=False, callback=_note)
    return flag_group(
        noted("--checkpoint", type=path, help="The model that all is about."),
        noted("--stats", type=path, help="What slimoe calibrate measured of it."),
        noted("--text", "texts", multiple=True, metavar="[NAME=]FILE", help="To evaluate on: not the calibration's."),
        noted(
            "--windows",
            type=click.IntRange(1),
            default=n_windows,
            show_default=True,
            help="Of 512 tokens, of each text.",
        ),
        noted("--threads", type=click.IntRange(1), help="[default: physical cores]"),
        noted("--smoke", is_flag=True, help="Seconds only: shows that the bench works, measures nothing."),
    )


def _note(context: click.Context, option: click.Parameter, value: object) -> None:
    context.meta[f"{_META}{option.name}"] = value
