"""Memory of the program itself, beside weights, KV cache, experts' slots and intermediate results.

All of it is computed from the file and the flags, so that `slimoe plan`, `run` and `serve` come to the same figure,
whatever each of them has loaded when it asks.
"""

from gguf import GGMLQuantizationType

from slimoe.offload.memory import prompt_record
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.plan.engine_config import PromptConfig

_HELD_BYTES, _HELD_STEP = 60 << 20, 20 << 20
"""Python, numpy, ggml and our modules hold 50 to 53 MiB when a model is opened, depending on the command. Libraries for
graphics cards take more, which is counted in steps, so that the few MiB between commands make no difference."""
_LAYER_BYTES = 512 << 10
"""The graphs that are kept of one layer, some 20 KB each."""
_TEXT_BYTES = 400
"""One token or merge, in the header, in libllama's vocabulary and while that is made; measured with up to 128,000."""
_COPY_BYTES = 3 << 10
"""What Python keeps of one copy of an expert: 1.2 KiB for where it lies, and its place in the caches."""
_STEP_BYTES, _REQUEST_BYTES = 7 << 20, 1 << 20
"""What Python takes for steps, and for each request at once: eight took 6 MiB more than one, all with scores."""
_LOGIT_ROWS = 64
"""Rows of logits at once for the probabilities of a prompt's tokens."""


def held_bytes(resident: int) -> int:
    """Bytes that a process with `resident` bytes before it opens a model counts as held: the same for all commands."""
    return max(_HELD_BYTES, -(-resident // _HELD_STEP) * _HELD_STEP)


def program_bytes(held: int, n_layer: int, n_texts: int, n_copies: int) -> int:
    """Bytes of the program for a model with `n_texts` texts in its vocabulary and `n_copies` copies of experts."""
    return held + n_layer * _LAYER_BYTES + n_texts * _TEXT_BYTES + n_copies * _COPY_BYTES


def request_bytes(spec: ModelSpec, n_batch: int, n_parallel: int) -> int:
    """Bytes of steps and requests beside their graphs' buffers: ggml's scratch memory, logits, and Python's objects."""
    scratch = 4 * n_batch * max(widest_row(spec), spec.n_embd)
    return scratch + 4 * spec.n_vocab * (_LOGIT_ROWS + n_parallel) + _STEP_BYTES + n_parallel * _REQUEST_BYTES


def prompt_bytes(prompts: PromptConfig, spec: ModelSpec, kv_type: GGMLQuantizationType) -> int:
    """Bytes of what is kept of prompts on disk while it is in memory; raises UsageError for too small a bound."""
    if prompts.prompt_cache is None:
        return 0
    prompt_record.check_bound(prompts.prompt_cache_size, spec, kv_type)
    return prompt_record.held_bytes(spec, kv_type)


def most_logit_rows(n_batch: int, n_parallel: int) -> int:
    """The most rows of logits that one step computes."""
    return min(n_batch, _LOGIT_ROWS + n_parallel)


def widest_row(spec: ModelSpec) -> int:
    """Values of the longest row that is quantised before it is multiplied."""
    return max(spec.layer_shape(layer).n_ff for layer in range(spec.n_layer))
