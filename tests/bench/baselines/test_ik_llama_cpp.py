"""ik_llama.cpp's process, with llama.cpp itself under the names that the package gives its functions."""

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from bench.baselines.ik_llama_cpp import IK_BASELINES, IkConfig, IkError, IkLlamaCpp, check_ik
from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.limits.flags import ik_flag, ik_python
from bench.limits.isolated_run import Job, carry_out
from bench.limits.limited_runs import run_candidate
from bench.models.random_model import write_random_model
from bench.models.shapes import SHAPES
from slimoe.offload.errors import UsageError

PYTHON = Path(sys.executable)
STAND_IN = """
from llama_cpp.llama_cpp import *
import ctypes
import llama_cpp.llama_cpp as llama

llama_free_model = llama.llama_model_free


class _Remove:
    def __call__(self, context, *of):
        return llama.llama_memory_seq_rm(llama.llama_get_memory(context), *of)


class _lib:
    llama_kv_cache_seq_rm = _Remove()


class _ModelParams(llama.llama_model_params):
    repack_tensors = False


def llama_model_default_params():
    params = _ModelParams.from_buffer_copy(llama.llama_model_default_params())
    params.use_extra_bufts = False
    return params
"""
"""Its functions have llama.cpp's names, but for a few."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ik") / "model.gguf"
    write_random_model(path, SHAPES["smoke"].spec)
    return path


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ik_llama_cpp"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_ctypes_api.py").write_text(STAND_IN)
    monkeypatch.setenv("SLIMOE_IK_PATH", str(tmp_path))


@pytest.mark.usefixtures("stand_in")
def test_its_steps_are_those_of_the_library(model: Path) -> None:
    check_ik(PYTHON)
    ours = IkLlamaCpp(IkConfig(PYTHON, model, 256, 1, repack=False))
    theirs = LlamaCpp(LlamaCppConfig(model, 256, 1, extra_buffers=False))
    with closing(ours), closing(theirs):
        for candidate in (ours, theirs):
            candidate.prefill([5, 6, 7, 8, 9])
            candidate.truncate(3)
        assert np.array_equal(ours.decode(11), theirs.decode(11))
        assert (ours.n_past, theirs.n_past) == (4, 4)
        timing = ours.measure([1, 2, 3], [4, 5])
        assert min(timing.prefill, timing.decode) > 0
        assert ours.n_past == 4


@pytest.mark.usefixtures("stand_in")
def test_a_whole_job_chooses_what_the_library_chooses(model: Path) -> None:
    job = Job(next(iter(IK_BASELINES)), str(model), 1, prompt=(5, 6, 7), tokens=(8, 9, 10, 11), n_warm=1)
    run = run_candidate(job, None, PYTHON)
    assert run.outcome is not None, run.failure
    theirs = carry_out(replace(job, candidate="llama.cpp --no-repack"))
    assert (run.outcome.choices, run.outcome.checksum) == (theirs.choices, theirs.checksum)
    assert len(run.outcome.step_seconds) == 3


@pytest.mark.usefixtures("stand_in")
def test_a_file_that_it_cannot_load_is_told(tmp_path: Path) -> None:
    path = tmp_path / "missing.gguf"
    with pytest.raises(IkError, match=r"missing\.gguf: ik_llama\.cpp cannot load this file"):
        IkLlamaCpp(IkConfig(PYTHON, path, 256, 1, repack=True))


def test_a_python_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No module named 'ik_llama_cpp'"):
        check_ik(PYTHON)
    with pytest.raises(UsageError, match="No such file"):
        check_ik(tmp_path / "python")

    @click.command()
    @ik_flag
    def command() -> None:
        click.echo(str(ik_python()))

    assert CliRunner().invoke(command, []).stdout == "None\n"
    assert CliRunner().invoke(command, ["--ik", str(PYTHON)]).exit_code == 2
