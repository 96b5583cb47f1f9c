"""llama.cpp as a candidate, through llama-cpp-python's low-level API, set as llama-bench sets it.

Memory-mapped weights, f16 KV cache, flash attention as llama.cpp chooses, physical batches of 512 and a thread
pool that polls. Extra buffer types (the rearranged copies of weights) are on in llama.cpp's defaults and can be
switched off: neither is better at both decode and prefill.
"""

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np

from slimoe.offload.errors import ModelFileError, SlimoeError
from slimoe.offload.ggml import buffers as ggml_backend

N_BATCH = 512
EvalCallback = Any
"""A function of the C type `llama.ggml_backend_sched_eval_callback`."""
_ALL_LAYERS = 1 << 16
_NO_CALLBACK = llama.ggml_backend_sched_eval_callback()
SILENT = llama.llama_log_callback(lambda _level, _text, _data: None)
FILE_TYPES = {"Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "IQ2_M": 29, "IQ3_XXS": 23, "IQ4_XS": 30}
"""llama.cpp's numbers of the mixes that are compared with. Those of IQ types are meant to have an importance matrix."""


class QuantizerError(SlimoeError):
    """llama.cpp did not make the file."""


@dataclass(frozen=True, slots=True)
class LlamaCppConfig:
    """How llama.cpp loads a model; `extra_buffers` is its `--no-repack` the other way round.

    `device` is ggml's address of the device that has the whole model; with None the CPU computes, whatever there is.
    `kv_type` is ggml's number of the KV cache's type.
    """

    model: Path
    n_ctx: int
    n_threads: int
    extra_buffers: bool = True
    device: int | None = None
    kv_type: int = 1


@llama.llama_log_callback  # type: ignore[untyped-decorator]  # ctypes' own
def _log_errors(level: int, text: bytes, _: int | None) -> None:
    if level == 4:
        sys.stderr.buffer.write(text)


class LlamaCpp:
    """A llama.cpp model with one sequence in its KV cache. Has the stepping interface of the engine.

    `watch` is asked about every tensor that is computed, as llama.cpp's `cb_eval` is, and must outlive the baseline.
    """

    def __init__(self, config: LlamaCppConfig, watch: EvalCallback = _NO_CALLBACK) -> None:
        self.config = config
        self.n_past = 0
        llama.llama_log_set(_log_errors, ctypes.c_void_p(0))

        model_params = llama.llama_model_default_params()
        model_params.use_extra_bufts = config.extra_buffers
        # Without a list llama.cpp takes every GPU, for large batches even where no layer is there.
        devices = (ctypes.c_void_p * 2)(config.device, None)
        model_params.devices = ctypes.addressof(devices)
        model_params.n_gpu_layers = 0 if config.device is None else _ALL_LAYERS
        self._model = llama.llama_model_load_from_file(str(config.model).encode(), model_params)
        if not self._model:
            raise ModelFileError(config.model, "llama.cpp cannot load this file.", "Compare on a stock GGUF file.")

        params = llama.llama_context_default_params()
        params.cb_eval = watch
        params.n_ctx = config.n_ctx
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_threads = params.n_threads_batch = config.n_threads
        params.type_k = params.type_v = config.kv_type
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_AUTO
        self._context = llama.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp made no context"

        pool_params = ggml_backend.ThreadpoolParams()
        ggml_backend.ggml_threadpool_params_init(ctypes.addressof(pool_params), config.n_threads)
        self._pool = ggml_backend.ggml_threadpool_new(ctypes.addressof(pool_params))
        # llama-cpp-python binds every function but this one, and only its own copy of the library knows its contexts.
        attach = llama._lib.llama_attach_threadpool
        attach.argtypes, attach.restype = [ctypes.c_void_p] * 3, None
        attach(self._context, self._pool, None)
        self.n_vocab = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model)))

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Appends tokens; returns the last one's logits, float32 of shape (n_vocab,), good until the next call."""
        for begin in range(0, len(tokens), N_BATCH):
            self._append(tokens[begin : begin + N_BATCH])
        return np.ctypeslib.as_array(llama.llama_get_logits(self._context), (self.n_vocab,))

    def decode(self, token: int) -> np.ndarray:
        """One step: appends one token and returns its logits."""
        return self.prefill([token])

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """Appends tokens; returns the logits of all of them, float32 of shape (len(tokens), n_vocab)."""
        rows = []
        for begin in range(0, len(tokens), N_BATCH):
            batch = tokens[begin : begin + N_BATCH]
            self._append(batch, all_logits=True)
            shape = (len(batch), self.n_vocab)
            rows.append(np.ctypeslib.as_array(llama.llama_get_logits(self._context), shape).copy())
        return np.concatenate(rows)

    def _append(self, tokens: Sequence[int], *, all_logits: bool = False) -> None:
        """Reads one batch; the logits of its last token are computed, or those of every token."""
        array, wanted = (ctypes.c_int32 * len(tokens))(*tokens), (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))
        batch = llama.llama_batch_get_one(array, len(tokens))
        if all_logits:
            batch.logits = ctypes.cast(wanted, ctypes.POINTER(ctypes.c_int8))
        status = llama.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode returned {status} at {self.n_past} of {self.config.n_ctx} tokens"
        self.n_past += len(tokens)

    def truncate(self, n_past: int) -> None:
        """Forgets everything after the first `n_past` tokens, and with recurrent layers everything."""
        assert n_past <= self.n_past
        memory = llama.llama_get_memory(self._context)
        self.n_past = n_past if llama.llama_memory_seq_rm(memory, 0, n_past, -1) else 0
        if not self.n_past:
            llama.llama_memory_clear(memory, False)

    def close(self) -> None:
        """Gives all memory and threads back; the object must not be used afterwards."""
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)
        ggml_backend.ggml_threadpool_free(self._pool)


def llama_quantize(
    source: Path,
    target: Path,
    file_type: int,
    n_threads: int,
    importance: Mapping[str, np.ndarray] | None = None,
    *,
    pure: bool = False,
    output_type: int | None = None,
) -> None:
    """Has llama.cpp quantise a GGUF file to a mix, by its number; `pure` is one type for all matrices.

    `importance` has the mean squares of what each tensor reads, float32 [matrices, n_per_row]. `output_type` is that
    of the output matrix where it is not the mix's. Raises QuantizerError.
    """
    llama.llama_log_set(SILENT, ctypes.c_void_p(0))
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = file_type, n_threads, pure
    if output_type is not None:
        params.output_tensor_type = output_type
    rows = (llama.llama_model_imatrix_data * (len(importance or {}) + 1))()
    for row, (tensor, values) in zip(rows, (importance or {}).items(), strict=False):
        row.name, row.size = tensor.encode(), values.size
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        params.imatrix = rows
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise QuantizerError(f"llama.cpp could not quantise {source} to the mix of number {file_type}.")
