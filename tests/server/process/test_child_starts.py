"""Where ggml cannot be loaded every process that this program starts says so in a sentence, or does without it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.server.models.plans import plan_models
from tests.models.live_server import DEADLINE

ROOT = Path(__file__).parents[3]
SOURCES = [path.read_text() for folder in ("server", "offload", "converter") for path in (ROOT / folder).rglob("*.py")]
STARTED = sorted({name for text in SOURCES for name in re.findall(r'"(slimoe\.[\w.]+_(?:process|child|start))"', text)})
LM_EVAL = {
    "__init__.py": "simple_evaluate = None",
    "api/instance.py": "class Instance: pass",
    "models/openai_completions.py": "class LocalCompletionsAPI: pass",
    "tasks.py": "class TaskManager: pass",
}
"""What the harness imports of lm-eval, which need not be installed here."""


@pytest.fixture
def without_ggml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find a llama_cpp without libraries, and an lm_eval that does nothing."""
    for name, text in {
        "llama_cpp/__init__.py": "",
        **{f"lm_eval/{name}": text for name, text in LM_EVAL.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("SLIMOE_LIBRARY", "llama-cpp-python")


def test_the_processes_that_are_started_are_known() -> None:
    endings = {name.rpartition(".")[2] for name in STARTED}
    assert endings == {"engine_start", "grammar_process", "harness_child", "plan_child", "template_process"}


@pytest.mark.usefixtures("without_ggml")
@pytest.mark.parametrize("module", STARTED)
def test_a_process_begins_without_ggml(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import {module}"], capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("without_ggml")
async def test_plans_tell_that_ggml_cannot_be_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    plans = await plan_models([EngineConfig(Path("one.gguf")), EngineConfig(Path("two.gguf"))])
    for plan in plans:
        assert plan is not None
        assert plan.problem is not None
        assert re.fullmatch(
            r"SLIMOE_LIBRARY asks for .* lacks \S*libggml-base\S+ Install it again: pip install .*", plan.problem
        )
        assert not plan.fits
    assert capfd.readouterr() == ("", "")
