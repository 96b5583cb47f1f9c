"""Sentences for a person about a context window that is larger than what the model was trained for, or than can be."""

from slimoe.offload.errors import UsageError
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources
from slimoe.offload.plan.engine_config import EngineConfig

MAX_THREADS = 512  # ggml's own limit
MAX_PARALLEL = 256


def context_notes(spec: ModelSpec, n_ctx: int) -> tuple[str, ...]:
    """A note where a context window of `n_ctx` tokens is longer than what the model was trained for, else none."""
    parts = list[str]()
    if n_ctx > spec.n_ctx_scaled:
        parts.append(f"it was trained for {spec.n_ctx_scaled} tokens, beyond which answers get worse")
    n_window = 0 if spec.windowed else spec.n_window
    if 0 < n_window < n_ctx:
        parts.append(
            f"its own attention looks back {n_window} tokens (sliding window), but full attention is used, which "
            "reads longer texts otherwise than it was trained to"
        )
    if not parts:
        return ()
    least = min(n for n in (spec.n_ctx_scaled, n_window) if n)
    return (f"The context window of {n_ctx} tokens is larger than the model's: {'; '.join(parts)}. Use --ctx {least}.",)


def divisor_notes(sources: ModelSources, spec: ModelSpec, n_ctx: int) -> tuple[str, ...]:
    """A note where a file lacks the divisors of rotation frequencies (longrope) that a context of `n_ctx` needs.

    Nothing is divided then, as in llama.cpp. `sources` are the file's own, not yet those of a context.
    """
    short, long, n_orig = sources.rope_factors_short, sources.rope_factors_long, spec.rope.n_ctx_orig
    is_long = n_ctx > n_orig
    if sources.rope_freqs or (long if is_long else short) or not (short or long or spec.rope.scaling == "longrope"):
        return ()
    lacks, than = ("rope_factors_long", "more") if is_long else ("rope_factors_short", "no more")
    advice = "Convert the model again, with both."
    if is_long and short:
        advice = f"Use --ctx {n_orig}, or convert the model again, with both."
    elif long:
        advice = f"Use --ctx {n_orig + 1} or more, or convert the model again, with both."
    return (
        f"The model's file lacks {lacks}.weight, by which a context window of {n_ctx} tokens, {than} than the original "
        f"{n_orig}, divides the frequencies of its rotation (longrope). They are not divided, as in llama.cpp, and "
        f"answers are worse. {advice}",
    )


def window_note(spec: ModelSpec) -> str:
    """A note about a model with sliding window attention, whatever its context; empty for other models."""
    if not spec.n_window or spec.windowed:
        return ""
    return (
        f"The model's own attention looks back {spec.n_window} tokens (sliding window), but full attention is used. Up "
        "to that many tokens of context they are the same."
    )


def check_context(spec: ModelSpec, n_ctx: int) -> None:
    """Raises UsageError for a context window in which the model's indexer would select what attention sees."""
    n_most = spec.attention.n_indexed
    if 0 < n_most < n_ctx:
        raise UsageError(
            f"The context window of {n_ctx} tokens is too large for the architecture {spec.architecture.name!r}: "
            f"beyond {n_most} tokens its attention sees only those that an indexer selects, which is not supported. "
            f"Use --ctx {n_most} or less, where the indexer changes nothing."
        )


def check_settings(config: EngineConfig, n_ctx: int, n_threads: int) -> None:
    """Raises UsageError for a number of tokens, requests or threads that cannot be."""
    n_batch, n_parallel = config.context.n_batch, config.context.n_parallel
    settings = {"--ctx": n_ctx, "--batch": n_batch, "--parallel": n_parallel, "--threads": n_threads}
    for name, value in settings.items():
        if value < 1:
            raise UsageError(f"{name} is {value}, but must be at least 1.")
    if n_threads > MAX_THREADS:
        raise UsageError(f"--threads is {n_threads}, but must be at most {MAX_THREADS}.")
    if n_parallel > MAX_PARALLEL:
        raise UsageError(f"--parallel is {n_parallel}, but must be at most {MAX_PARALLEL}.")
