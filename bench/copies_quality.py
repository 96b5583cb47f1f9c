"""What saved bytes cost: divergence from the unquantised model, of uniform types and of an engine that is lossy.

A checkpoint is converted to F32, which llama.cpp reads for reference, to several uniform types, and to a native file
with two copies of every expert. Our engine reads the texts token by token with each file, the cache of experts live
and room for a share of the better copies' bytes, the same for all modes; twice, cold and again warm, since what a
lossy mode answers may depend on what is in memory. The second half of each text is scored. A mode is a name, a file
and changes of the engine's configuration; further ones of two copies are named with --mode. Bytes per token are those
of the experts that were multiplied, and those read from disk and used. The table goes to stderr, the last line of
stdout is one JSON document. Divergences are in nats.

    python -m bench.copies_quality --checkpoint ~/models/mixtral --room 0.5 --mode "kl 0.01:max_kl=0.01"
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.limits.engine_changes import Changes, parse_changes
from bench.limits.flags import threads_flag
from bench.lossy.copies_hints import measure_hints, write_hints
from bench.lossy.copies_scores import PASSES, Text, score
from bench.models.random_checkpoint import write_random_checkpoint
from bench.models.shapes import SHAPES
from bench.models.topics import natural_tokens
from slimoe.converter.convert import ConvertOptions, convert, find_pair
from slimoe.offload.cache.host_slots import slot_bytes
from slimoe.offload.cache.slots import slot_classes
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.plan.engine_config import ContextConfig, EngineConfig, changed
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.offload.resources.processors import default_threads
from slimoe.offload.text.tokenizer import Tokenizer

OLD_FLAGS = {"pair": "copies"}
"""Old spellings that are still understood for one version."""
UNIFORM = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K_PURE")
_PIECES, _PIECE_TOKENS = 10, 64
"""A calibration text is read in some places only, since its topics may change."""
ROOMS = (1.0, 0.5, 0.25)


@dataclass(frozen=True, slots=True)
class Mode:
    """One row of the table: a file's type, or two with a comma for two copies, and changes of the configuration."""

    name: str
    kind: str
    changes: Changes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared, over `texts` of token ids, each mode with room for each share of the better of two `copies`."""

    checkpoint: Path
    directory: Path
    copies: str
    modes: tuple[Mode, ...]
    rooms: tuple[float, ...]
    texts: tuple[tuple[int, ...], ...]
    n_threads: int
    calibration: tuple[tuple[int, ...], ...] = ()

    @property
    def n_ctx(self) -> int:
        """The context, in the steps of 256 tokens that llama.cpp takes."""
        return -(-max(map(len, self.texts)) // 256) * 256

    def file(self, kind: str) -> Path:
        """The checkpoint as a file of that type or those two copies, converted when it is first asked for.

        With a calibration text, a file of two copies says what saving on each expert costs. `kind` may be the path of a
        file as well.
        """
        if Path(kind).is_file():
            return Path(kind)
        path = self.directory / f"{kind}.gguf"
        if not path.exists():
            pair = kind if "," in kind else None
            convert(ConvertOptions(self.checkpoint, path, "F32" if pair else kind, self.n_threads, pair=pair))
            if pair and self.calibration:
                with_hints = path.with_suffix(".hints")
                texts = [Text(tokens, np.empty((0, 0))) for tokens in self.calibration]
                write_hints(path, with_hints, measure_hints(path, texts, self.n_threads, lambda line: None))
                with_hints.replace(path)
        return path


def parse_mode(text: str, copies: str) -> Mode:
    """A mode of the two copies written as NAME:FIELD=VALUE, with spaces between several changes; raises UsageError."""
    name, separator, changes = text.partition(":")
    if not separator:
        raise UsageError(f"--mode takes NAME:FIELD=VALUE, not {text!r}.")
    return Mode(name, copies, parse_changes(changes.split()))


def reference(plan: Plan) -> list[Text]:
    """The texts and llama.cpp's logits of the F32 file, which is deleted."""
    path = plan.file("F32")
    texts = []
    with closing(LlamaCpp(LlamaCppConfig(path, plan.n_ctx, plan.n_threads, extra_buffers=False))) as baseline:
        for tokens in plan.texts:
            baseline.truncate(0)
            texts.append(Text(tokens, baseline.score(tokens)))
    path.unlink()
    return texts


def measure(plan: Plan, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row per mode and room; a mode that the engine refuses has the refusal in place of figures."""
    texts = reference(plan)
    whole = total_expert_bytes(plan.file(plan.copies))
    rows = []
    for mode in plan.modes:
        config = EngineConfig(plan.file(mode.kind), n_threads=plan.n_threads, context=ContextConfig(n_ctx=plan.n_ctx))
        for room in plan.rooms:
            say(f"{mode.name}, room {room:g}")
            row = {"mode": mode.name, "file": mode.kind, "changes": dict(mode.changes), "room": room}
            try:
                row |= score(changed(config, mode.changes), texts, int(room * whole))
            except SlimoeError as error:
                row["failure"] = str(error)
            rows.append(row)
    return rows


def total_expert_bytes(model: Path) -> int:
    """Memory of all experts of a file, each in its better copy."""
    return sum(n * slot_bytes(kind) for kind, n in slot_classes(plan_engine(EngineConfig(model)).layers).items())


def read_texts(checkpoint: Path, files: Sequence[Path], n_tokens: int, directory: Path) -> list[tuple[int, ...]]:
    """The first tokens of each file, or of the .txt files of the checkpoint's text folder but its calibration."""
    found = files or sorted((checkpoint / "text").glob("*.txt"))
    chosen = [file for file in found if files or "calibration" not in file.name]
    if not chosen:
        raise UsageError(f"{checkpoint} has no folder of texts. Name some with --text.")
    smallest = convert(ConvertOptions(checkpoint, directory / "vocabulary.gguf", UNIFORM[-1])).path
    with closing(Tokenizer.open(read_gguf(smallest))) as tokenizer:
        texts = [tuple(tokenizer.encode(file.read_text("utf-8"), add_bos=True)[:n_tokens]) for file in chosen]
    smallest.unlink()
    if min(map(len, texts)) < 2:
        raise UsageError("A text holds no two tokens. Name longer ones.")
    return texts


def read_pieces(checkpoint: Path, file: Path, directory: Path) -> list[tuple[int, ...]]:
    """Tokens from places that are spread over a text."""
    text = file.read_text("utf-8")
    pieces = []
    for number in range(_PIECES):
        path = directory / f"piece{number}.txt"
        begin = len(text) * number // _PIECES
        path.write_text(text[begin : begin + 32 * _PIECE_TOKENS], "utf-8")
        pieces.append(path)
    return read_texts(checkpoint, pieces, _PIECE_TOKENS, directory)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The figures for a person, cheapest first among those of one room."""
    sizes = ("file MB", "expert MB/token", "in memory MB", "read MB/token")
    drawn = Table("room", "mode", *sizes, "KL cold", "KL warm", "99.9 %", "same top", title="Divergence and bytes")
    for row in sorted(rows, key=lambda row: (-row["room"], row.get("warm", {}).get("expert_bytes", 0.0))):
        if "failure" in row:
            drawn.add_row(f"{row['room']:g}", row["mode"], row["failure"])
            continue
        cold, warm = (row[name] for name in PASSES)
        megabytes = (row["file_bytes"], warm["expert_bytes"], row["slot_bytes"], warm["missed_bytes"])
        kls = (cold["kl_mean"], warm["kl_mean"], warm["kl_99.9%"])
        cells = (*(f"{1e-6 * value:.2f}" for value in megabytes), *(f"{value:.2e}" for value in kls))
        drawn.add_row(f"{row['room']:g}", row["mode"], *cells, f"{warm['same_top']:.4f}")
    return drawn


def smallest_plan(directory: Path) -> Plan:
    """A comparison on a random checkpoint in a few seconds."""
    checkpoint, shape = directory / "checkpoint", SHAPES["smoke"]
    write_random_checkpoint(checkpoint, shape, routing="natural")
    modes = (Mode("Q8_0", "Q8_0"), Mode("two copies, exact", "Q8_0,Q4_K"))
    texts = (tuple(natural_tokens(24, shape.n_vocab)),)
    return Plan(checkpoint, directory, "Q8_0,Q4_K", modes, (1.0, 0.25), texts, n_threads=1)


@click.command(context_settings={"token_normalize_func": lambda name: OLD_FLAGS.get(name, name)})
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A Hugging Face Mixtral.")
@click.option("--text", "files", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", type=click.IntRange(2), default=256, show_default=True, help="Tokens of each text.")
@click.option(
    "--copies",
    default="Q4_K,Q2_K_PURE",
    show_default=True,
    help="Types of the two copies, the better first, or a native file of two copies with what it says of its experts.",
)
@click.option("--mode", "modes", multiple=True, metavar="NAME:FIELD=VALUE", help="A lossy mode of the copies.")
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to measure each expert's errors with, for modes that need them; some of it is read twice per expert.",
)
@click.option("--uniform/--no-uniform", default=True, help="Compare with files of one type as well.", show_default=True)
@click.option("--room", "rooms", type=click.FloatRange(0), multiple=True, default=ROOMS, show_default=True)
@threads_flag
@click.option("--smoke", is_flag=True, help="Seconds only, on a tiny random checkpoint.")
def main(
    checkpoint: Path | None,
    files: tuple[Path, ...],
    tokens: int,
    copies: str,
    modes: tuple[str, ...],
    calibration: Path | None,
    uniform: bool,
    rooms: tuple[float, ...],
    threads: int | None,
    smoke: bool,
) -> None:
    """Compare lossy modes of two copies with uniform types, in divergence and bytes."""
    console = Console(stderr=True, width=120)
    try:
        with tempfile.TemporaryDirectory(prefix="slimoe-copies-") as name:
            directory = Path(name)
            if smoke:
                plan = smallest_plan(directory)
            elif checkpoint is not None:
                if not Path(copies).is_file():
                    find_pair(copies)
                own = (Mode("two copies, exact", copies), *(parse_mode(mode, copies) for mode in modes))
                texts = tuple(read_texts(checkpoint, files, tokens, directory))
                alone = tuple(Mode(kind, kind) for kind in UNIFORM if uniform)
                plan = Plan(checkpoint, directory, copies, alone + own, rooms, texts, threads or default_threads())
                if calibration is not None:
                    plan = replace(plan, calibration=tuple(read_pieces(checkpoint, calibration, directory)))
            else:
                raise UsageError("Name a --checkpoint, or use --smoke.")
            rows = measure(plan, console.print)
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    console.print(table(rows))
    print(
        json.dumps(
            {
                "rows": rows,
                "copies": plan.copies,
                "pair": plan.copies,
                "n_texts": len(plan.texts),
                "n_tokens": len(plan.texts[0]),
            }
        )
    )


if __name__ == "__main__":
    main()
