"""ik_llama.cpp as a candidate: a fork of llama.cpp with its own CPU kernels, in a process and a Python of its own.

pip install ik-llama-cpp-python numpy    # in a virtual environment; --no-binary builds it for this processor
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.baselines.stepping import Timing
from slimoe.offload.errors import SlimoeError, UsageError

ROOT = Path(__file__).parents[2]
IK_BASELINES = {"ik_llama.cpp -rtr": True, "ik_llama.cpp": False}
"""Candidates by name, and whether they rearrange weights when they load them; as in `ik_process`, which is apart."""


class IkError(SlimoeError):
    """The process of ik_llama.cpp ended before it had answered."""


@dataclass(frozen=True, slots=True)
class IkConfig:
    """How ik_llama.cpp loads a model; `python` is the interpreter that has its package."""

    python: Path
    model: Path
    n_ctx: int
    n_threads: int
    repack: bool


def check_ik(python: Path) -> None:
    """Raises UsageError if a Python lacks what the baseline needs."""
    command = [str(python), "-c", "import ik_llama_cpp._ctypes_api, numpy"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=ik_environment())
    except OSError as error:
        raise UsageError(f"--ik must name a Python with ik-llama-cpp-python: {python}: {error.strerror}.") from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it ended"])[-1]
        raise UsageError(f"--ik must name a Python with ik-llama-cpp-python and NumPy; {python} says: {why}.")


def ik_environment() -> dict[str, str]:
    """The environment of the process: it finds the benches, and nothing of this Python's packages."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    further = os.environ.get("SLIMOE_IK_PATH", "")
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), further)))}


class IkLlamaCpp:
    """A model of ik_llama.cpp with one sequence in its KV cache, stepped from here and timed where it runs."""

    def __init__(self, config: IkConfig) -> None:
        """Starts the process and loads the model; raises IkError."""
        self.config = config
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (close)
        arguments = ["steps", str(config.model), str(config.n_ctx), str(config.n_threads)]
        self._process = subprocess.Popen(
            [str(config.python), "-m", "bench.baselines.ik_process", *arguments, "yes" if config.repack else "no"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=ik_environment(),
        )
        self.n_past = 0
        self._answer()

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Appends tokens; returns the last one's logits, float32 of shape (n_vocab,)."""
        _, logits = self._ask({"prefill": list(tokens)})
        return logits

    def decode(self, token: int) -> np.ndarray:
        """Appends one token; returns its logits."""
        return self.prefill([token])

    def truncate(self, n_past: int) -> None:
        """Forgets everything after the first `n_past` tokens."""
        self._ask({"truncate": n_past})

    def measure(self, prefill: Sequence[int], decode: Sequence[int]) -> Timing:
        """One round at the current depth, as `bench.baselines.stepping.measure` times it, timed in its process."""
        answer, _ = self._ask({"measure": [list(prefill), list(decode)]})
        return Timing(answer["prefill"], answer["decode"])

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> tuple[dict[str, Any], np.ndarray]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        self.n_past = answer["n_past"]
        return answer, np.frombuffer(self._process.stdout.read(answer["n_bytes"]), np.float32)

    def _ended(self) -> IkError:
        self._process.wait()
        self._log.seek(0)
        last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
        return IkError(f"ik_llama.cpp ended with {self._process.returncode}: {last}")

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()
