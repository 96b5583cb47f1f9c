"""Several answers at once: both candidates of the bench give the answers that each prompt gets alone."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.limits.isolated_run import OURS
from bench.limits.stream_run import StreamJob, run_llama_cpp, run_ours
from bench.models.random_model import write_random_model
from bench.models.shapes import SHAPES
from bench.quality.streams import StreamRunError, main, prompts, ratio, run

PLAIN = "llama.cpp --no-repack"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "model.gguf"
    write_random_model(path, SHAPES["smoke"].spec, kind="F32", routing="natural")
    return path


def test_streams_answer_as_alone(model: Path) -> None:
    job = StreamJob(OURS, str(model), 1, prompts(model, 3, 8), n_tokens=6, n_warm=2)
    expected = []
    with closing(LlamaCpp(LlamaCppConfig(model, n_ctx=256, n_threads=1, extra_buffers=False))) as alone:
        for prompt in job.prompts:
            alone.truncate(0)
            answer = [int(alone.prefill(prompt).argmax())]
            while len(answer) < job.n_tokens:
                answer.append(int(alone.decode(answer[-1]).argmax()))
            expected.append(answer)
    ours, theirs = run_ours(job), run_llama_cpp(replace(job, candidate=PLAIN))
    assert ours.answers == expected
    assert theirs.answers == expected
    assert min(ours.tokens_per_second, theirs.tokens_per_second) > 0


def test_a_run_that_ends_early_says_why(tmp_path: Path) -> None:
    job = StreamJob(OURS, str(tmp_path / "missing.gguf"), 1, ((1, 2),), 6, 2)
    with pytest.raises(StreamRunError, match=r"slimoe with 1 streams ended: .*missing"):
        run(job, None)


def test_ratios_are_to_the_better_baseline() -> None:
    assert ratio({OURS: 30.0, "llama.cpp": 10.0, PLAIN: 20.0}) == 1.5


def test_mistakes_are_usage_errors() -> None:
    for arguments in (["--streams", "0"], ["--streams", "two"], ["--ratio", "0.5"]):
        assert CliRunner().invoke(main, arguments).exit_code == 2
