"""What healing wins back: files of several kinds before and after training their small tensors for so long.

All are made of one checkpoint and its statistics, and evaluated on texts that neither calibration nor training saw:
windows of 512 tokens, the second half of each scored against the checkpoint in float32. The time is that of the
processor, all threads together, so that a busy machine does not matter. The last line of stdout is one JSON document.

    python -m bench.quality.healing --checkpoint ~/mixtral --stats STATS --text news=news.txt --heal 2m --heal 5m
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from bench.limits import machine
from bench.quality.lab_flags import LabFlags, lab_flags
from bench.quality.smoke_model import smoke_model
from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.budget.compressed_experts import CompressedSource
from slimoe.converter.convert import ConvertOptions, plan
from slimoe.converter.forward.texts import TextFile
from slimoe.converter.heal.heal import heal, write_healed
from slimoe.converter.heal.lesson import HealSettings, heal_texts
from slimoe.converter.recipe.recipe import ExpertRecipe, Recipe, StorageRecipe
from slimoe.converter.report.eval_text import read_eval_text
from slimoe.converter.report.evaluation import Reference
from slimoe.converter.report.quality import summarise
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.statistics_file import load_statistics
from slimoe.converter.write.writer import write_planned
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.resources.duration import parse_minutes
from slimoe.server.chat.text_encoder import TokenizerEncoder

KINDS = ("native", "stock", "dropped", "merged", "neurons", "narrower", "main", "main-f32")
Row = dict[str, Any]


def recipe(kind: str, source: ModelSource, target: Path, share: float = 0.75) -> Recipe:
    """Of a file with the bytes of Q2_K, of that mix itself, or of one in 4 bits (and in 32) with a `share` of the
    experts, or with experts half as wide, or with half as many that are computed.

    `target` is a path where a file could be written.
    """
    keep, main, four = round(share * source.spec.n_expert), source.spec.n_expert_used // 2, StorageRecipe("Q4_K_M")
    whole = StorageRecipe("F32", attention="F32", token="F32", output="F32")
    if kind == "native":
        return Recipe(target_size=plan(ConvertOptions(source.path, target, "Q2_K", force=True)).layout.n_bytes)
    return {
        "stock": Recipe(format="stock", types=StorageRecipe("Q2_K")),
        "dropped": Recipe(experts=ExpertRecipe(keep=keep), types=four),
        "merged": Recipe(experts=ExpertRecipe(keep=keep, merge="hc-smoe"), types=four),
        "neurons": Recipe(experts=ExpertRecipe(keep=keep, merge="neurons"), types=four),
        "narrower": Recipe(experts=ExpertRecipe(width=source.spec.n_ff // 2), types=four),
        "main": Recipe(experts=ExpertRecipe(main=main), types=four),
        "main-f32": Recipe(experts=ExpertRecipe(main=main), types=whole),
    }[kind]


def rows(
    source: ModelSource,
    statistics: Statistics,
    reference: Reference,
    kinds: tuple[str, ...],
    times: tuple[float, ...],
    directory: Path,
    share: float = 0.75,
) -> Iterator[Row]:
    """A row for each kind of file and time, and one for each file as it is written, whose time is 0."""
    path, texts = directory / "m.gguf", heal_texts(statistics.tokens)
    for kind in kinds:
        made = plan_compression(source, statistics, recipe(kind, source, path, share))
        write_planned(source, made, path, statistics, force=True)
        before = summarise(reference.compare(gguf_source(path)))
        row = {"kind": kind, "n_bytes": path.stat().st_size}
        if made.n_main:
            # Plain routing to as many experts, whose divergence the vectors are to lower.
            fewer = summarise(reference.compare(CompressedSource(source, made.n_main)))
            row["kl_plain"] = fewer.total.divergence.mean
        yield row | {"seconds": 0.0, "kl": before.total.divergence.mean, "kl_error": before.total.divergence.error}
        for seconds in times:
            healed = heal(
                source,
                path,
                texts,
                HealSettings(seconds, clock=time.process_time),
                [layer.block for layer in made.layers],
            )
            write_healed(path, healed)
            after = summarise(reference.compare(gguf_source(path)))
            yield row | {
                "seconds": seconds,
                "kl": after.total.divergence.mean,
                "kl_error": after.total.divergence.error,
                "left": after.total.divergence.mean / before.total.divergence.mean,
                "domains": {
                    name: [before.domains[name].divergence.mean, one.divergence.mean]
                    for name, one in after.domains.items()
                },
                "held": [healed.before.held, healed.after.held],
                "is_kept": healed.is_kept,
            }
            write_planned(source, made, path, statistics, force=True)


@click.command()
@lab_flags(4)
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS, show_default=True)
@click.option("--heal", "times", multiple=True, default=("2m",), show_default=True, help="Time to train for.")
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.75,
    show_default=True,
    help="Of the experts that are left.",
)
def main(
    kinds: tuple[str, ...],
    times: tuple[str, ...],
    share: float,
) -> None:
    """Measure what healing wins back."""
    flags = LabFlags.told()
    console, found = Console(stderr=True), list[Row]()
    torch.set_num_threads(flags.n_threads)
    try:
        seconds = [parse_minutes(one) or 0.0 for one in times]
        if min(seconds) <= 0:
            raise UsageError("Give times to train for, such as --heal 2m.")
        with tempfile.TemporaryDirectory(prefix="slimoe-healing-") as name:
            if flags.is_smoke:
                source, statistics, reference = smoke_model(Path(name) / "checkpoint")
                kinds, seconds = ("dropped",), [0.5]
            else:
                checkpoint, stats = flags.paths()
                source, files = open_source(checkpoint), [TextFile.parse(one) for one in flags.texts]
                n_tokens = 512 * flags.n_windows * len(files)
                with closing(TokenizerEncoder(source.path, source.metadata)) as encoder:
                    cut = read_eval_text(files, encoder, source.spec.n_ctx_train, n_tokens=n_tokens).windows
                statistics, reference = load_statistics(stats, source), Reference(source, cut)
            for row in rows(source, statistics, reference, kinds, tuple(seconds), Path(name), share):
                found.append(row)
                left = f" ({row['left']:.0%} left)" if "left" in row else ""
                if "kl_plain" in row:
                    left += f", {1 - row['kl'] / row['kl_plain']:.0%} of {row['kl_plain']:.5f} closed"
                console.print(f"{row['kind']} {row['n_bytes']:,} {row['seconds']:.0f} s KL {row['kl']:.5f}{left}")
            reference.close()
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    print(json.dumps({"rows": found, "texts": list(flags.texts), "share": share, "machine": machine.describe()}))


if __name__ == "__main__":
    main()
