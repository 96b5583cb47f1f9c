"""llama.cpp's context of the block that predicts a further token (MTP). Apart: only libllama's C++ has a part of it.

llama-ext.h declares the functions about hidden states without a C interface; they are found by their C++ names.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from bench.baselines.llama_cpp import SILENT

_MTP = 1
"""`LLAMA_CONTEXT_TYPE_MTP`."""


class LlamaCppMtp:
    """libllama's context of the model, which gives its hidden states, and its context of the block."""

    def __init__(self, path: Path) -> None:
        llama.llama_log_set(SILENT, ctypes.c_void_p(0))
        params = llama.llama_model_default_params()
        params.load_mtp, params.use_extra_bufts = True, False
        self._model = llama.llama_model_load_from_file(str(path).encode(), params)
        assert self._model
        self._main, self._block = self._context(0), self._context(_MTP)
        self.n_embd = int(llama.llama_model_n_embd(self._model))
        self.n_vocab = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model)))
        self._set = llama._lib._Z26llama_set_embeddings_nextnP13llama_contextbb
        self._set.argtypes, self._set.restype = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool], None
        self._get = llama._lib._Z26llama_get_embeddings_nextnP13llama_context
        self._get.argtypes, self._get.restype = [ctypes.c_void_p], ctypes.POINTER(ctypes.c_float)
        for context in (self._main, self._block):
            self._set(context, True, False)

    def _context(self, kind: int) -> Any:
        params = llama.llama_context_default_params()
        params.ctx_type, params.n_ctx, params.n_threads, params.n_threads_batch = kind, 256, 1, 1
        context = llama.llama_init_from_model(self._model, params)
        assert context
        return context

    def hidden(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The model's hidden states of all tokens, [n_tokens, n_embd]."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        assert llama.llama_decode(self._main, llama.llama_batch_get_one(array, len(tokens))) == 0
        return np.ctypeslib.as_array(self._get(self._main), (len(tokens), self.n_embd)).copy()

    def predict(
        self, tokens: Sequence[int], hidden: NDArray[np.float32], begin: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The block's logits [n_tokens, n_vocab] and hidden states for tokens from position `begin` on."""
        batch = llama.llama_batch_init(len(tokens), self.n_embd, 1)
        held = (ctypes.c_int32 * len(tokens))(*tokens)
        batch.token = ctypes.cast(held, ctypes.POINTER(ctypes.c_int32))
        batch.n_tokens = len(tokens)
        ctypes.memmove(batch.embd, np.ascontiguousarray(hidden, np.float32).ctypes.data, 4 * hidden.size)
        for index in range(len(tokens)):
            batch.pos[index], batch.n_seq_id[index], batch.seq_id[index][0] = begin + index, 1, 0
            batch.logits[index] = 1
        assert llama.llama_decode(self._block, batch) == 0
        batch.token = None
        logits = np.ctypeslib.as_array(llama.llama_get_logits(self._block), (len(tokens), self.n_vocab)).copy()
        last = np.ctypeslib.as_array(self._get(self._block), (len(tokens), self.n_embd)).copy()
        llama.llama_batch_free(batch)
        return logits, last

    def close(self) -> None:
        """Frees both contexts and the model."""
        for context in (self._block, self._main):
            llama.llama_free(context)
        llama.llama_model_free(self._model)
