"""ik_llama.cpp alone in a process of the Python that it is installed in: steps that it is asked for, or a whole job.

That Python needs the package ik-llama-cpp-python and NumPy, nothing of this project: two builds of ggml cannot be in
one process. The model is set as ik's own programs set it: flash attention, fused experts and reused graphs are on by
default, and `-rtr` (run-time repacking) loads rearranged copies of the weights in place of the mapped file.

`steps MODEL N_CTX N_THREADS REPACK` answers requests, a JSON object a line on stdin, with a JSON object a line on
stdout, behind which logits come as raw float32. `job` reads a `bench.limits.isolated_run.Job` as JSON from stdin and
writes its outcome as that module does.
"""

import ctypes
import json
import os
import resource
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ik_llama_cpp import _ctypes_api as ik

from bench.baselines.stepping import measure

N_BATCH = 512
REPACKS = {"ik_llama.cpp -rtr": True, "ik_llama.cpp": False}
"""The candidates by name, and whether they rearrange weights when they load them."""


class IkModel:
    """A model with one sequence in its KV cache; has the stepping interface of the engine."""

    def __init__(self, path: str, n_ctx: int, n_threads: int, *, repack: bool) -> None:
        self.n_past = 0
        params = ik.llama_model_default_params()
        params.repack_tensors, params.use_mmap = repack, not repack
        self._model = ik.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            sys.exit(f"{path}: ik_llama.cpp cannot load this file.")
        self._n_vocab = ik.llama_vocab_n_tokens(ik.llama_model_get_vocab(self._model))
        context_params = ik.llama_context_default_params()
        context_params.n_ctx = n_ctx
        context_params.n_batch = context_params.n_ubatch = N_BATCH
        context_params.n_threads = context_params.n_threads_batch = n_threads
        self._context = ik.llama_init_from_model(self._model, context_params)
        if not self._context:
            sys.exit(f"{path}: ik_llama.cpp makes no context for this file.")
        self._batch = ik.llama_batch_init(N_BATCH, 0, 1)
        # The package binds no function that forgets the end of a sequence.
        self._forget = ik._lib.llama_kv_cache_seq_rm
        self._forget.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
        self._forget.restype = ctypes.c_bool

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Appends tokens; returns the last one's logits, float32 of shape (n_vocab,), good until the next call."""
        n_last = 0
        for begin in range(0, len(tokens), N_BATCH):
            n_last = self._append(tokens[begin : begin + N_BATCH])
        logits = ik.llama_get_logits_ith(self._context, n_last - 1)
        return np.ctypeslib.as_array(logits, (self._n_vocab,))

    def decode(self, token: int) -> np.ndarray:
        """One step: appends one token and returns its logits."""
        return self.prefill([token])

    def _append(self, tokens: Sequence[int]) -> int:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at] = token, self.n_past + at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = at == len(tokens) - 1
        status = ik.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode returned {status} at {self.n_past} tokens"
        self.n_past += len(tokens)
        return len(tokens)

    def truncate(self, n_past: int) -> None:
        """Forgets everything after the first `n_past` tokens."""
        self._forget(self._context, 0, n_past, -1)
        self.n_past = n_past

    def close(self) -> None:
        """Gives all memory back."""
        ik.llama_free(self._context)
        ik.llama_free_model(self._model)


def serve(model: IkModel, answers: BinaryIO) -> None:
    """Answers requests until stdin ends: `prefill`, `truncate` and `measure` of a `bench.baselines.stepping` round."""

    def answer(value: dict[str, Any], logits: np.ndarray | None = None) -> None:
        data = b"" if logits is None else logits.tobytes()
        answers.write(json.dumps(value | {"n_bytes": len(data)}).encode() + b"\n" + data)
        answers.flush()

    answer({"n_past": 0})
    for line in sys.stdin:
        request = json.loads(line)
        if "measure" in request:
            timing = measure(model, *request["measure"])
            answer({"n_past": model.n_past, "prefill": timing.prefill, "decode": timing.decode})
        elif "truncate" in request:
            model.truncate(request["truncate"])
            answer({"n_past": model.n_past})
        else:
            logits = model.prefill(request["prefill"])
            answer({"n_past": model.n_past}, logits)


def carry_out(job: dict[str, Any]) -> dict[str, Any]:
    """The fields of an `Outcome` of a job, as `bench.limits.isolated_run.carry_out` finds them of other candidates."""
    begin = time.perf_counter()
    n_ctx = -(-(len(job["prompt"]) + len(job["tokens"])) // 256) * 256
    model = IkModel(job["model"], n_ctx, job["n_threads"], repack=REPACKS[job["candidate"]])
    opened = time.perf_counter()
    model.prefill(job["prompt"])
    prompted = time.perf_counter()
    step_seconds, choices, checksum, disk = [], [], 0, 0
    for number, token in enumerate(job["tokens"]):
        if number == job["n_warm"]:
            disk = _disk_bytes()
        before = time.perf_counter()
        logits = model.decode(token)
        if number >= job["n_warm"]:
            step_seconds.append(time.perf_counter() - before)
            choices.append(int(logits.argmax()))
            checksum = zlib.crc32(logits.tobytes(), checksum)
    return {
        "load_seconds": opened - begin,
        "prompt_seconds": prompted - opened,
        "step_seconds": step_seconds,
        "graph_seconds": 0.0,
        "counters": {},
        "disk_bytes": _disk_bytes() - disk,
        "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "choices": choices,
        "checksum": checksum,
    }


def _disk_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text("utf-8").splitlines())
    return int(fields["read_bytes"])


def main() -> None:
    """Does what the arguments say; whatever the library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    ik.llama_backend_init()
    if sys.argv[1] == "job":
        answers.write(json.dumps(carry_out(json.load(sys.stdin))).encode() + b"\n")
        answers.flush()
    else:
        path, n_ctx, n_threads, repack = sys.argv[2:]
        serve(IkModel(path, int(n_ctx), int(n_threads), repack=repack == "yes"), answers)


if __name__ == "__main__":
    main()
