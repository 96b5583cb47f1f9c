"""From flags to the plan of a compressed file, with all that carrying it out needs."""

from dataclasses import dataclass, replace
from pathlib import Path

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.budget.merge_checks import check_merge
from slimoe.converter.budget.named_types import NamedTypes
from slimoe.converter.layout.layer import check_uncompressed
from slimoe.converter.layout.offsets import FileLayout, lay_out
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.quant.unfit_types import TypedMatrix
from slimoe.converter.recipe.check import needs_statistics
from slimoe.converter.recipe.fields import SourceSizes
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.recipe.toml_file import make_recipe, recipe_tables
from slimoe.converter.recipe.words import Words
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.errors import UsageError
from slimoe.server.jobs.planning_time import tell_planning
from slimoe.server.jobs.specialise import known_statistics, specialised
from slimoe.server.options.compress_options import FLAGS, CompressOptions, Tables
from slimoe.server.terminal.progress_bars import step_bar


@dataclass(frozen=True, slots=True)
class CompressWork:
    """A model, what was measured of it, what is asked for, and the plan and layout of the file."""

    source: ModelSource
    statistics: Statistics | None
    recipe: Recipe
    plan: CompressPlan
    layout: FileLayout

    @property
    def matrices(self) -> tuple[TypedMatrix, ...]:
        """The file's matrices, with what stands in for types that do not fit their rows."""
        return NamedTypes(self.source, self.recipe, len(self.plan.layers)).typed(self.layout)


def plan_work(model: Path, options: CompressOptions, n_threads: int) -> CompressWork:
    """Opens, measures what types cost where that decides, and plans; writes nothing.

    Neurons of merged experts stay to be chosen, by `with_neurons`. Raises UsageError, StatisticsError, DoesNotFitError,
    and ModelFileError or UnsupportedModelError for the model.
    """
    source = open_source(model)
    recipe = recipe_of(source, options)
    if options.stats is None and recipe.specialise is None and needs_statistics(recipe):
        raise UsageError(
            "What matters in the model is not known yet. Measure it once, for all sizes: "
            f"slimoe calibrate {model} -o STATS, and give --stats STATS."
        )
    if recipe.experts.merge is not None:
        check_merge(source, recipe)
    statistics = known_statistics(source, options, recipe)
    with step_bar(tell_planning(source, statistics, recipe, n_threads)) as on_progress:
        plan = plan_compression(source, statistics, recipe, n_threads=n_threads, is_open=True, on_progress=on_progress)
    return CompressWork(source, statistics, recipe, plan, lay_out(source, plan, statistics))


def neuron_seconds(work: CompressWork) -> float:
    """The seconds that `with_neurons` will take."""
    if not work.plan.is_open:
        return 0.0
    # torch is heavy, and most plans do without.
    from slimoe.converter.budget.merging import joining_seconds

    assert work.statistics is not None
    return joining_seconds(work.source, work.statistics, work.plan)


def with_neurons(work: CompressWork) -> CompressWork:
    """The work with the neurons of merged experts chosen, if they are still open; raises as reading does."""
    if not work.plan.is_open:
        return work
    from slimoe.converter.budget.merging import with_joined_neurons

    assert work.statistics is not None
    with step_bar() as on_progress:
        plan = with_joined_neurons(work.source, work.statistics, work.plan, on_progress)
    layout = lay_out(work.source, plan, work.statistics)
    assert layout.n_bytes == work.layout.n_bytes, "the file's size depends on which neurons are chosen"
    return replace(work, plan=plan, layout=layout)


def is_healed(options: CompressOptions) -> bool:
    """Whether flags or their recipe ask for healing; raises UsageError for a recipe that cannot be read."""
    fit = options.merged({} if options.recipe is None else recipe_tables(options.recipe)).get("fit")
    return isinstance(fit, dict) and fit.get("heal") is not None


def recipe_of(source: ModelSource, options: CompressOptions) -> Recipe:
    """The recipe that flags name, with what other flags say in its place; raises UsageError."""
    spec = source.spec
    check_uncompressed(source)
    n_stored = max(layer.n_stored for layer in source.layers)
    sizes = SourceSizes(spec.n_layer, n_stored, spec.n_ff, spec.n_expert_used)
    tables: Tables = {}
    if options.recipe is not None:
        tables = {"name": Path(options.recipe).stem} | dict(recipe_tables(options.recipe))
    tables = options.merged(tables)
    typed = options.typed
    if tables.get("specialise") is not None:
        # What is merged down to is the flag's where nothing else says it.
        is_said = "keep" in tables.get("experts", {})
        typed |= {} if is_said or "specialise" not in typed else {"keep": "--specialise"}
        tables = specialised(tables, source)
    has_target = not tables.keys().isdisjoint(("target_size", "target_bpw"))
    merges = "merge" in tables.get("experts", {})
    if options.constants and tables.get("free_constants") and not has_target and not merges:
        problem = "--constants puts constant experts in place of pruned ones, and nothing says how many"
        raise UsageError(f"{problem}. Give --keep-experts, --target-size or --target-bpw.")
    recipe = make_recipe(tables, sizes, Words(options.recipe or "the command line", typed, FLAGS))
    if "score" in options.tables.get("experts", {}) and recipe.experts.keep is None:
        raise UsageError("--score ranks experts that are dropped, and none is. Give --keep-experts.")
    if "score" in options.tables.get("experts", {}) and recipe.experts.merge is not None:
        how = typed.get("merge", "the recipe")
        raise UsageError(f"--score ranks experts that are dropped, and {how} merges them. Leave one of them out.")
    return recipe
