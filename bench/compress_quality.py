"""What compressing costs at equal bytes: llama.cpp's quantizer with an importance matrix, and our files.

All start from one checkpoint and from statistics of the same texts; all files are evaluated by what their bytes say of
other texts: windows of 512 tokens, the second half of each scored against the checkpoint in float32, the mean
divergence and the rise of the perplexity in each domain. Two parts: files of the sizes of llama.cpp's mixes, and
growing budgets. A third, which must be asked for, has half of the experts' bytes, or another share, by every way to
have fewer experts or smaller ones, in float32. A ratio of divergences above 1 means that ours is smaller. Progress goes
to stderr, the last line of stdout is one JSON document. An OLMoE whose heads share keys goes through
`bench.models.equal_heads` first. The recipes of others are in `bench.quality.seed_table`.

    python -m bench.compress_quality --checkpoint ~/mixtral --stats STATS --text news=news.txt --text code=code.txt
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import click
from rich.console import Console

from bench.baselines.llama_cpp import FILE_TYPES, llama_quantize
from bench.limits import machine
from bench.quality.lab import Lab, Row
from bench.quality.lab_flags import LabFlags, lab_flags
from bench.quality.smoke_model import smoke_model
from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.recipe.recipe import ExpertRecipe, FitRecipe, Recipe, StorageRecipe
from slimoe.offload.errors import DoesNotFitError, SlimoeError

BITS = (1.6, 2.1, 2.6, 3.1, 4.3)
PARTS = ("baselines", "budgets", "experts")
OLD_PARTS = {"rivals": "baselines"}
"""Old spellings that are still understood for one version."""
Say = Callable[[str], None]


def baselines(lab: Lab, say: Say) -> list[Row]:
    """Rows of llama.cpp's mixes, and of ours with the same bytes: stock and native, with and without error feedback.

    Mixes of K types are made with and without importance, and the better one is compared with.
    """
    whole, rows = lab.directory / "whole.gguf", []
    convert(ConvertOptions(lab.checkpoint, whole, "F32", lab.n_threads))
    importance = lab.importance()
    for name, file_type in FILE_TYPES.items():
        made: list[Row] = []
        for what, known in (("", importance), (", no imatrix", None))[: 1 if name.startswith("IQ") else 2]:
            path = lab.directory / f"{name}.gguf"
            llama_quantize(whole, path, file_type, lab.n_threads, known)
            made.append({"name": f"llama.cpp {name}{what}"} | lab.evaluated(path))
            say(_line(made[-1]))
        rows += made
        theirs = min(made, key=lambda row: float(row["kl"]))
        for kind, feedback in product(("stock", "native"), (False, True)[: 1 + lab.feedback]):
            recipe = _sized(kind, theirs["n_bytes"], feedback)
            row = {"name": f"{kind}{', feedback' if feedback else ''} at {name}", "at": name} | lab.ours(recipe)
            rows.append(row | {"kl_vs_llamacpp": theirs["kl"] / row["kl"]})
            say(_line(rows[-1]))
    whole.unlink()
    return rows


def _sized(kind: str, n_bytes: int, feedback: bool) -> Recipe:
    recipe = Recipe(target_size=n_bytes, fit=FitRecipe(feedback=feedback, refit=feedback))
    return replace(recipe, format="stock") if kind == "stock" else recipe


def budgets(lab: Lab, say: Say) -> list[Row]:
    """Rows of growing budgets, for which whatever pays may be left out: the divergence must not rise."""
    rows = []
    for bits in BITS:
        row: Row = {"name": f"{bits} bits", "bits": bits}
        try:
            row |= lab.ours(Recipe(target_bpw=bits, free_constants=True, free_layers=True))
        except DoesNotFitError as error:
            row["refused"] = str(error)
        rows.append(row)
        say(_line(row))
    return rows


def experts(lab: Lab, say: Say, share: float = 0.5) -> list[Row]:
    """Rows of a share of the experts' bytes, in float32: of fewer experts, and of smaller ones."""
    rows, types = [], StorageRecipe("F32", attention="F32", token="F32", output="F32")
    keep, width = round(share * lab.source.spec.n_expert), round(share * lab.source.spec.n_ff)
    ways = {
        "merged, neurons": ExpertRecipe(keep, merge="neurons"),
        "merged, HC-SMoE": ExpertRecipe(keep, merge="hc-smoe"),
        "merged, M-SMoE": ExpertRecipe(keep, merge="m-smoe"),
        "dropped, best subset": ExpertRecipe(keep),
        "dropped, REAP": ExpertRecipe(keep, "reap"),
        "constants in place of the others": ExpertRecipe(keep, replacement="constant"),
        "narrower": ExpertRecipe(width=width),
    }
    for name, one in ways.items():
        rows.append({"name": name} | lab.ours(Recipe(experts=one, types=types, hints=False)))
        say(_line(rows[-1]))
    return rows


def _line(row: Row) -> str:
    if "refused" in row:
        return f"{row['name']:<40} {row['refused']}"
    worst = max(row["perplexity_rise"].values())
    ratio = f"  {row['kl_vs_llamacpp']:.2f} times" if "kl_vs_llamacpp" in row else ""
    return f"{row['name']:<40} {row['n_bytes']:>12,} bytes  KL {row['kl']:.5f}  perplexity {100 * worst:+.1f} %{ratio}"


def as_json(found: Mapping[str, list[Row]]) -> Row:
    """All rows as one document: ratios by name at the top, and whether divergences fall as budgets grow."""
    ratios = {row["name"]: row["kl_vs_llamacpp"] for row in found.get("baselines", []) if "kl_vs_llamacpp" in row}
    document: Row = {"kl_vs_llamacpp": ratios}
    rows = [row for row in found.get("budgets", []) if "kl" in row]
    document["kl_falls"] = all(after["kl"] <= before["kl"] for before, after in pairwise(rows)) if rows else None
    old_names = {old: found[name] for old, name in OLD_PARTS.items() if name in found}
    return document | dict(found) | old_names


def smoke(lab: Lab, say: Say) -> list[Row]:
    """Rows of two small files, of our recipe and of one that drops a layer's experts."""
    few = StorageRecipe(candidates=("Q4_0", "Q8_0"))
    drop = Recipe(drop_ffn=1, types=StorageRecipe(expert="Q4_0"), hints=False)
    rows = [
        {"name": name} | lab.ours(one) for name, one in (("ours", Recipe(target_bpw=12, types=few)), ("drop", drop))
    ]
    say("\n".join(map(_line, rows)))
    return rows


@click.command(context_settings={"token_normalize_func": lambda name: OLD_PARTS.get(name, name)})
@lab_flags(8)
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS[:2], show_default=True)
@click.option(
    "--feedback/--no-feedback", default=True, show_default=True, help="Files with feedback too: minutes each."
)
@click.option(
    "--expert-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Of the experts' bytes, for the part experts.",
)
def main(
    parts: tuple[str, ...],
    feedback: bool,
    expert_share: float,
) -> None:
    """Measure what compressing costs at equal bytes."""
    flags = LabFlags.told()
    console = Console(stderr=True)
    steps = {"baselines": baselines, "budgets": budgets, "smoke": smoke}
    steps["experts"] = partial(experts, share=expert_share)
    try:
        with tempfile.TemporaryDirectory(prefix="slimoe-quality-") as name:
            if flags.is_smoke:
                path, parts = Path(name) / "checkpoint", ("smoke",)
                source, statistics, reference = smoke_model(path)
                lab = Lab(path, source, statistics, reference, Path(name), 1)
            else:
                lab = flags.lab(Path(name), feedback=feedback)
            found = {part: steps[part](lab, lambda line: console.print(line, markup=False)) for part in parts}
            about = {"n_windows": flags.n_windows, "texts": list(flags.texts), "bf16_bytes": lab.bf16_bytes}
            lab.reference.close()
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    print(json.dumps(as_json(found) | about | {"machine": machine.describe()}))


if __name__ == "__main__":
    main()
