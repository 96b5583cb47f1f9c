"""`--specialise TEXT`: the statistics that a conversion goes by are those of a task's own text, measured on the way.

MEO (EMNLP 2023) merges the experts that a task uses into one by its gates. That needs training for experts that have a
nonlinearity, so here groups of experts are joined by what their neurons do on the text.
"""

import tempfile
from contextlib import closing
from pathlib import Path

from slimoe.converter.forward.texts import DEFAULT_LENGTH, DEFAULT_TOKENS, TextFile, read_texts
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.tasks import tasks_of
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.statistics_file import load_statistics
from slimoe.offload.errors import UnsupportedModelError, UsageError
from slimoe.server.chat.text_encoder import TokenizerEncoder
from slimoe.server.options.compress_options import CompressOptions, Tables
from slimoe.server.telling import tell
from slimoe.server.terminal.progress_bars import duration, step_bar


def specialised(tables: Tables, source: ModelSource) -> Tables:
    """A recipe's tables that also merge experts, down to half of them where nothing else is said.

    Raises UnsupportedModelError for a model without experts.
    """
    spec = source.spec
    if not spec.n_expert:
        problem = "the model has no experts to specialise."
        raise UnsupportedModelError(source.path, problem, "Convert it without --specialise.")
    n_stored = max(layer.n_stored for layer in source.layers)
    half = max(spec.n_expert_used, (n_stored + 1) // 2)
    return {**tables, "experts": {"merge": "neurons", "keep": half, **tables.get("experts", {})}}


def known_statistics(source: ModelSource, options: CompressOptions, recipe: Recipe) -> Statistics | None:
    """The statistics that flags name or ask for, None if they do neither.

    Raises UsageError for both, or a text that is too short, and as reading and measuring do.
    """
    if recipe.specialise is None:
        return None if options.stats is None else load_statistics(options.stats, source)
    if options.stats is not None:
        raise UsageError("--specialise measures the model on the task's text, and --stats is of other texts. Give one.")
    has_target = recipe.target_size is not None or bool(recipe.target_bpw)
    # A time for feedback is spent by what types cost as well.
    return _measured(source, recipe.specialise, prices=has_target or not isinstance(recipe.fit.feedback, bool))


def _measured(source: ModelSource, text: str, *, prices: bool) -> Statistics:
    """The statistics of a text, with what it takes to say what types cost if that is asked for."""
    # torch is heavy, and most commands do without.
    from slimoe.converter.stats.calibrate import settings
    from slimoe.converter.stats.estimate import estimate
    from slimoe.converter.stats.forward_pass import calibrate

    length = min(DEFAULT_LENGTH, source.spec.n_ctx_train)
    with closing(TokenizerEncoder(source.path, source.metadata)) as encoder:
        task = read_texts([TextFile.parse(text)], encoder, DEFAULT_TOKENS, length, "--specialise")
    how = settings("auto", "none", sensitivity=prices)
    seconds = estimate(source, task, how).total_seconds
    for name in tasks_of(source.metadata):
        tell(f"{source.path} was made for the task of {name} already: what that does not use is lost in it.")
    tell(f"{text}: {task.n_tokens:,} tokens to specialise on, measured in about {duration(seconds)}.")
    with tempfile.TemporaryDirectory(prefix="slimoe-specialise-") as name, step_bar() as on_progress:
        return calibrate(
            source, task, how, Path(name), lambda what, done, total: on_progress(f"measuring: {what}", done, total)
        )
