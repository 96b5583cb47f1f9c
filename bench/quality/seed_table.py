"""The seed's table: what each way to make a mixture of experts smaller loses within the same bytes, and gains.

Every file is made of one checkpoint and its statistics, and is evaluated on texts that calibration did not see: windows
of 512 tokens, the second half of each scored against the checkpoint in float32. At each size a method is shown by its
file of the least KL divergence within it: llama.cpp's mixes with an importance matrix and without; one type for all;
Unified MoE Compression's drops of experts, layers and blocks, in 4 bits; Mixture Compressor's types, HOBBIT's two
copies, HC-SMoE's and M-SMoE's merges; and ours. Weights that are pruned to zeros make a GGUF file no smaller, and are
left out.

Rows are kept in OUT/rows.jsonl, and are not measured again; what is to be measured again is deleted there. Files stay
in OUT until their speed is measured: in turn with F16, in one process. The table goes to OUT/table.md and stderr, the
picture to OUT/quality.svg, and the last line of stdout is one JSON document.

    python -m bench.quality.seed_table --checkpoint ~/mixtral --stats STATS --text news=news.txt --out results
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console

from bench.limits import machine
from bench.quality.lab import Lab, Row
from bench.quality.lab_flags import LabFlags, lab_flags
from bench.quality.seed_report import Table, markdown, picture
from bench.quality.seed_rows import Rows, about, cost, measured
from bench.quality.seed_speed import decode_ratio, open_engine
from bench.quality.seed_trials import F16, METHODS, Refusal, Trial
from bench.quality.smoke_model import smoke_model
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.files.whole_file import Destination

SHARES = (12.5, 16.0, 23.0, 32.0, 44.0)
"""Of the checkpoint's bytes in 16 bits, in percent: 23 is the seed's 77.1 % less, 12.5 llama.cpp's least."""
SPEED_TOKENS = 64

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured: which methods at which sizes in percent, with speeds of so many rounds or, for 0, without."""

    methods: tuple[str, ...] = tuple(METHODS)
    shares: tuple[float, ...] = SHARES
    n_rounds: int = 5


def measure(lab: Lab, rows: Rows, settings: Settings, evaluating: float, say: Say) -> Table:
    """Measures what is not in the rows yet; an evaluation takes so many seconds. Raises SlimoeError."""
    sizes = [int(share / 100 * lab.bf16_bytes) for share in sorted(settings.shares)]
    found = [one for method in settings.methods for one in METHODS[method](method, lab, sizes)]
    trials = [one for one in found if isinstance(one, Trial)]
    missing = rows.lacking(trials, "kl")
    if missing:
        say(f"to measure: {cost(lab, missing, evaluating)}")
    for number, trial in enumerate(missing):
        row = measured(lab, trial, file_of(lab, trial))
        rows.add(row)
        what = row.get("refused") or f"{row['n_bytes']:>12,} bytes  KL {row['kl']:.5f}"
        say(f"{number + 1}/{len(missing)}  {trial.id:<44} {what}")
    if settings.n_rounds:
        time_decoding(lab, rows, [one for one in trials if one.method != F16], settings.n_rounds, say)
    kept = [rows.by_id[trial.id] for trial in trials]
    return Table(kept, sizes, lab.bf16_bytes, [one for one in found if isinstance(one, Refusal)])


def file_of(lab: Lab, trial: Trial) -> Path:
    """Where a trial's file lies until its speed is measured."""
    name = "".join(letter if letter.isalnum() else "-" for letter in trial.id)
    return lab.directory / f"{name}.gguf"


def time_decoding(lab: Lab, rows: Rows, trials: Sequence[Trial], n_rounds: int, say: Say) -> None:
    """Adds speeds to the rows that have none, and deletes their files; a file that is gone is made again first."""
    lacking = rows.lacking(trials, "decode_vs_f16")
    if not lacking:
        return
    whole = file_of(lab, Trial(F16, F16))
    for trial in (Trial(F16, F16), *lacking):
        if not file_of(lab, trial).exists():
            trial.make(lab, file_of(lab, trial))
    tokens = lab.reference.windows.sequences.tokens[0][:SPEED_TOKENS]
    with closing(open_engine(whole, lab.n_threads)) as engine:
        for trial in lacking:
            path = file_of(lab, trial)
            speed = decode_ratio(engine, path, tokens, n_rounds)
            rows.add({"id": trial.id} | speed)
            path.unlink()
            say(f"{trial.id:<50} {speed['decode_vs_f16']:.2f} times F16's speed")


def smoke(directory: Path) -> tuple[Lab, Settings]:
    """A random checkpoint, and a few methods at one size."""
    source, statistics, reference = smoke_model(directory / "checkpoint")
    lab = Lab(directory / "checkpoint", source, statistics, reference, directory, 1)
    return lab, Settings((F16, "one type", "Layer Drop", "Expert Drop, best subset", "HC-SMoE"), (20.0, 70.0), 1)


def as_json(lab: Lab, table: Table) -> Row:
    """All rows, and the best of each method at each size by its share."""
    best = {
        table.share(size): {
            method: row["id"] for method in table.methods if (row := table.best(method, size)) is not None
        }
        for size in table.sizes
    }
    refused = [{"method": one.method, "n_bytes": one.n_bytes, "reason": one.reason} for one in table.refusals]
    return {"best": best, "rows": list(table.rows), "refused": refused, "bf16_bytes": lab.bf16_bytes}


@click.command()
@lab_flags(8)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of rows, files, table and picture.")
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, help="Which methods.  [all]")
@click.option(
    "--size",
    "shares",
    type=click.FloatRange(1, 100),
    multiple=True,
    default=SHARES,
    show_default=True,
    help="Percent of the bytes in 16 bits.",
)
@click.option("--rounds", type=click.IntRange(0), default=5, show_default=True, help="Of speed; 0 measures none.")
def main(
    out: Path | None,
    methods: tuple[str, ...],
    shares: tuple[float, ...],
    rounds: int,
) -> None:
    """Measure all methods at the same bytes, in one table and one picture."""
    flags = LabFlags.told()
    console = Console(stderr=True)
    torch.set_num_threads(flags.n_threads)
    settings = Settings(methods or tuple(METHODS), shares, rounds)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        with ExitStack() as stack:
            begin = time.monotonic()
            if flags.is_smoke:
                out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slimoe-seed-")))
                lab, settings = smoke(out)
            else:
                flags.paths()
                if out is None:
                    raise UsageError("Name --out, a folder for rows, files, table and picture.")
                out.mkdir(parents=True, exist_ok=True)
                # Another run would measure the same rows, and find their files half made.
                stack.enter_context(Destination(out / "rows.jsonl", resumes=True))
                lab = flags.lab(out)
            stack.callback(lab.reference.close)
            rows = Rows.open(out / "rows.jsonl", about(lab))
            table = measure(lab, rows, settings, time.monotonic() - begin, say)
            (out / "table.md").write_text(markdown(table), "utf-8")
            (out / "quality.svg").write_bytes(picture(table, lab.source.path.name))
            say(markdown(table))
            document = as_json(lab, table)
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    print(
        json.dumps(document | {"texts": list(flags.texts), "n_windows": flags.n_windows, "machine": machine.describe()})
    )


if __name__ == "__main__":
    main()
