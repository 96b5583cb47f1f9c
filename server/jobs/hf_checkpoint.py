"""`slimoe convert --hf`: a checkpoint with fewer or narrower experts, or fewer layers, as a checkpoint again.

`slimoe plan --hf` tells what that would be, and refuses what it refuses.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec

from slimoe.converter.budget.compress import plan_removal
from slimoe.converter.budget.merge_checks import check_merge
from slimoe.converter.hf.export import (
    NewCheckpoint,
    check_checkpoint,
    check_directory_target,
    lay_out_checkpoint,
    write_checkpoint,
)
from slimoe.converter.layout.layer import check_uncompressed
from slimoe.converter.layout.metadata import left_out
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.recipe.check import needs_statistics
from slimoe.converter.recipe.recipe import FitRecipe, Recipe, StorageRecipe
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.errors import UsageError
from slimoe.offload.resources.memory import human
from slimoe.offload.resources.processors import usable_processors
from slimoe.server.jobs.compress_plan import recipe_of
from slimoe.server.jobs.compress_report import expected_loss
from slimoe.server.jobs.planning_time import tell_planning
from slimoe.server.jobs.specialise import known_statistics
from slimoe.server.options.compress_options import CompressOptions
from slimoe.server.options.destination import reserve, unwritten
from slimoe.server.options.idle_flags import refuse_idle
from slimoe.server.telling import tell
from slimoe.server.terminal.progress_bars import byte_bar, duration, step_bar

_OF_A_FILE = (
    "type_name",
    "two_copies",
    "imatrix",
    "target_size",
    "target_bpw",
    "stock",
    "order",
    "search",
    "feedback",
    "refit",
    "heal",
    "eval_texts",
    "force",
)
"""Flags that say something of a GGUF file, its types or its report."""
_SPELT = {"type_name": "type", "eval_texts": "eval-text"}


@dataclass(frozen=True, slots=True)
class CheckpointWork:
    """A checkpoint that is read, what is left of it, and the checkpoint that is to be written."""

    source: ModelSource
    statistics: Statistics | None
    plan: CompressPlan
    made: NewCheckpoint


def convert_to_checkpoint(values: Mapping[str, Any], options: CompressOptions) -> None:
    """Plans, tells and, unless it is a dry run, writes; raises as planning and writing do."""
    _check_flags(values)
    target, n_threads, seconds = values["target"], values["threads"] or usable_processors(), 0.0
    check_directory_target(target)

    def planned() -> CheckpointWork:
        work = plan_checkpoint(values["source"], options, int(values["hf_bits"] or 16))
        check_directory_target(target, work.made.n_bytes)
        tell(f"{target}: {work.made.n_bytes:,} bytes ({human(work.made.n_bytes)}) will be written, {_summary(work)}")
        return work

    if values["dry_run"]:
        work = planned()
    else:
        with unwritten(target), reserve(target) as destination:
            work = _with_neurons(planned())
            with byte_bar(work.made.n_bytes) as on_progress:
                seconds = write_checkpoint(
                    work.source, work.made, destination, n_threads=n_threads, on_progress=on_progress
                )
        tell(f"{target}: {work.made.n_bytes:,} bytes in {seconds:.1f} s")
    if values["as_json"]:
        written = {"path": str(target), "seconds": round(seconds, 3)}
        click.echo(msgspec.json.encode(checkpoint_fields(work) | written))


def tell_checkpoint(values: Mapping[str, Any], options: CompressOptions) -> None:
    """Tells what `convert_to_checkpoint` would write; raises as that does."""
    _check_flags(values)
    work = plan_checkpoint(values["model"], options, int(values["hf_bits"] or 16))
    as_json = values["as_json"]
    click.echo(msgspec.json.encode(checkpoint_fields(work)) if as_json else "\n".join(_lines(work)))


def _check_flags(values: Mapping[str, Any]) -> None:
    """Raises UsageError for flags that say nothing of a checkpoint."""
    if not values["hf"]:
        raise click.UsageError("--hf-bits is for checkpoints. Give --hf as well.")
    for name in _OF_A_FILE:
        if values.get(name):
            flag = _SPELT.get(name, name).replace("_", "-")
            raise click.UsageError(f"--{flag} is for GGUF files, and --hf writes a checkpoint. Leave one of them out.")
    refuse_idle(["eval_tokens", "report"], "is for GGUF files, and --hf writes a checkpoint. Leave one of them out.")


def plan_checkpoint(model: Path, options: CompressOptions, n_bits: int) -> CheckpointWork:
    """What flags make of a checkpoint, and that its class can hold it; writes nothing.

    Raises UsageError and UnsupportedModelError for what cannot be held, and as reading the model and statistics do.
    """
    source = open_source(model)
    check_uncompressed(source)
    check_checkpoint(source)
    recipe = _removal_of(recipe_of(source, options), options)
    if options.stats is None and recipe.specialise is None and needs_statistics(recipe):
        problem = "What matters in the model is not known yet. Measure it once: "
        raise UsageError(f"{problem}slimoe calibrate {source.path} -o STATS, and give --stats STATS.")
    if recipe.experts.merge is not None:
        # Sizes that cannot be are refused before anything is measured; of types there is one.
        as_written = replace(recipe, format="stock", types=StorageRecipe("F32"))
        lay_out_checkpoint(source, check_merge(source, as_written), n_bits=n_bits)
    statistics = known_statistics(source, options, recipe)
    with step_bar(tell_planning(source, statistics, recipe, usable_processors())) as on_progress:
        plan = plan_removal(source, statistics, recipe, on_progress, is_open=True)
    made = lay_out_checkpoint(source, plan, statistics, n_bits=n_bits)
    for note in left_out(source):
        tell(note)
    return CheckpointWork(source, statistics, plan, made)


def _with_neurons(work: CheckpointWork) -> CheckpointWork:
    """The work with the neurons of merged experts chosen, if they are open, after telling how long that takes."""
    if not work.plan.is_open:
        return work
    from slimoe.converter.budget.merging import joining_seconds, with_joined_neurons

    assert work.statistics is not None
    seconds = joining_seconds(work.source, work.statistics, work.plan)
    tell(f"Choosing the neurons of merged experts takes about {duration(seconds)}.")
    with step_bar() as on_progress:
        plan = with_joined_neurons(work.source, work.statistics, work.plan, on_progress)
    return replace(
        work, plan=plan, made=lay_out_checkpoint(work.source, plan, work.statistics, n_bits=work.made.n_bits)
    )


def _summary(work: CheckpointWork) -> str:
    """Class, sizes and expected loss in one line."""
    made, spec = work.made, work.source.spec
    weights = "16 bits" if made.n_bits == 16 else f"feed-forward parts in {made.n_bits} bits (compressed-tensors)"
    return (
        f"{made.class_name}, {made.sizes.n_expert} of {spec.n_expert} experts in a layer, {made.sizes.n_ff} wide, "
        f"{len(made.sizes.blocks)} of {spec.n_layer} layers, {weights}; {expected_loss(work.plan)}"
    )


def _lines(work: CheckpointWork) -> Iterator[str]:
    """Each layer's experts by the source's numbers, and the checkpoint as a whole."""
    plan, made = work.plan, work.made
    for index, layer in enumerate(plan.layers):
        experts = " ".join("+".join(map(str, expert.members)) for expert in layer.experts) or "none, it is dense"
        yield f"layer {index}{'' if index == layer.block else f', {layer.block} of the source'}: experts {experts}"
    yield ""
    yield _summary(work)
    files = f"{len(made.shards)} file{'s' if len(made.shards) > 1 else ''} of weights"
    yield f"{made.n_bytes:,} bytes ({human(made.n_bytes)}) in {files}, and {len(made.files) + len(made.copied)} others"


def _removal_of(recipe: Recipe, options: CompressOptions) -> Recipe:
    """What a recipe leaves out, without what it says of a file; raises UsageError for one that has a size to meet."""
    if recipe.target_size is not None or recipe.target_bpw is not None:
        problem = f"{options.recipe}: the recipe has a size, which types meet, and checkpoints have one kind of weights"
        raise UsageError(f"{problem}. Say what to leave out: --keep-experts, --drop-blocks or --width.")
    plain = replace(recipe.experts, order="router")
    removal = replace(recipe, types=StorageRecipe(), fit=FitRecipe(recipe.fit.importance), experts=plain)
    if removal != recipe:
        tell(f"{options.recipe}: what the recipe says of types and of fitting them is for GGUF files, and left out.")
    return removal


def checkpoint_fields(work: CheckpointWork) -> dict[str, Any]:
    """All of it as JSON has it. `block` and the experts' members are the source's numbers."""
    plan, made = work.plan, work.made
    return {
        "source": str(work.source.path),
        "format": "hf",
        "class": made.class_name,
        "n_bytes": made.n_bytes,
        "n_tensors": made.n_tensors,
        "files": [*(shard.name for shard in made.shards), *made.files, *(path.name for path in made.copied)],
        "bits": made.n_bits,
        "n_expert": made.sizes.n_expert,
        "n_ff": made.sizes.n_ff,
        "layers": [
            {"block": layer.block, "experts": [list(expert.members) for expert in layer.experts]}
            for layer in plan.layers
        ],
        "expected_kl": plan.expected_kl,
        "expected_kl_lacks": list(plan.uncounted),
        "recipe": plan.recipe,
    }
