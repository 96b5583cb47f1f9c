"""Healing as a step of `slimoe convert`: the file lies in the folder of the run until it is healed."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimoe.converter.gguf.bytes import read_bytes
from slimoe.converter.heal.cost import HealCost, heal_cost, memory_of, pass_estimate
from slimoe.converter.heal.heal import HealReport, heal, write_healed
from slimoe.converter.heal.lesson import HealSettings, HealTexts, Tokens, heal_texts
from slimoe.converter.stats.calibrate import choose_device
from slimoe.offload.errors import SlimoeError
from slimoe.offload.files.whole_file import Destination, whole_file
from slimoe.offload.resources.memory import human
from slimoe.server.jobs.compress_plan import CompressWork
from slimoe.server.telling import tell
from slimoe.server.terminal.progress_bars import duration, status, step_bar

_UNHEALED = "unhealed.gguf"


@dataclass(frozen=True, slots=True)
class Healing:
    """What will be healed, on which texts and at what cost, known before the file is written."""

    work: CompressWork
    texts: HealTexts
    settings: HealSettings
    cost: HealCost

    @classmethod
    def planned(cls, work: CompressWork, other: Tokens = ()) -> "Healing":
        """The healing of a planned file, which may not be worse on `other` texts either.

        Raises UsageError for too little text, and DoesNotFitError if memory does not suffice.
        """
        assert work.statistics is not None
        assert work.recipe.fit.heal is not None
        texts = heal_texts(work.statistics.tokens, other)
        settings = HealSettings(work.recipe.fit.heal, choose_device("auto"))
        matrices = (matrix for tensor in work.layout.tensors for matrix in tensor.matrices if not matrix.copy)
        sizes = ((matrix.key.name, math.prod(matrix.shape)) for matrix in matrices)
        cost = heal_cost(work.source, work.layout.spec, sizes, texts)
        cost.is_whole(memory_of(settings.device))
        return cls(work, texts, settings, cost)

    def announce(self) -> None:
        """Tells what healing will take."""
        is_whole = self.cost.is_whole(memory_of(self.settings.device))
        how = "layer by layer, then as a whole" if is_whole else "layer by layer, as memory does not hold all of it"
        n_bytes = self.cost.whole_bytes if is_whole else self.cost.layer_bytes
        with status("trying how long healing will take"):
            passes = pass_estimate(self.work.source, self.texts, self.settings.device)
        tell(
            f"It will then be healed for {duration(self.settings.seconds)} and about {duration(passes)} for passes, "
            f"{how}, on {self.texts.n_train:,} tokens on {self.settings.device}, in up to {human(n_bytes)} of memory."
        )

    def path(self, destination: Destination) -> Path:
        """Where the file lies until it is healed."""
        return destination.folder / _UNHEALED

    def is_written(self, destination: Destination) -> bool:
        """Whether an interrupted run has left the whole file of this plan."""
        path, header = self.path(destination), self.work.layout.header
        is_whole = path.is_file() and path.stat().st_size == self.work.layout.n_bytes
        return is_whole and read_bytes(path, 0, len(header)).tobytes() == header

    def run(self, destination: Destination) -> HealReport:
        """Heals the file in the destination's folder, gives it its name, and tells what came of it."""
        path = self.path(destination)
        blocks = [layer.block for layer in self.work.plan.layers]
        with step_bar() as on_progress:
            report = heal(
                self.work.source,
                path,
                self.texts,
                self.settings,
                blocks,
                folder=destination.folder,
                on_progress=on_progress,
            )
        write_healed(path, report)
        with whole_file(destination.target, destination.folder) as part:
            os.replace(path, part)
        destination.forget()
        tell(f"{destination.target}: {report.text}")
        return report


def heal_fields(report: HealReport) -> dict[str, Any]:
    """What programs are told of healing."""
    return {
        "kl_before": report.before.held,
        "kl_after": report.after.held,
        "is_kept": report.is_kept,
        "seconds": report.seconds,
        "n_tokens": report.n_tokens,
    }


@contextmanager
def unfinished(destination: Destination) -> Iterator[None]:
    """Says, when the block ends early, where the same command goes on."""
    try:
        yield
    except (KeyboardInterrupt, SlimoeError):
        if not destination.is_empty:
            tell(f"What is done lies in {destination.folder}; the same command goes on there.")
        raise
