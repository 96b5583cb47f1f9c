"""Every bench runs to its end in its smoke mode, and its last line is the JSON document it promises."""

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import go_to_depth, kl_divergence, random_tokens
from bench.models.fine_models import FINE_MODELS
from bench.models.random_copies import write_random_native
from bench.models.random_model import WeightTypes, random_tensors, write_random_model
from bench.models.shapes import SHAPES
from bench.models.topics import STYLES
from slimoe.offload.engine import Engine
from slimoe.offload.gguf.header import GGUFFile, TensorInfo, read_gguf
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.model.mtp_block import with_mtp_layer
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.text.generation import Finished, GenerationRequest, SamplingParams
from tests.models.configs import engine_config
from tests.models.tiny_gguf import FineShape, write_family

ROOT = Path(__file__).parents[2]


SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT / "bench").with_suffix("").parts)
    for pattern in ("*.py", "api/*.py")
    for path in (ROOT / "bench").glob(pattern)
    if "@click.command" in path.read_text("utf-8")
)
SCRIPTS += [
    "drafts.gain",
    "lossy.gates",
    "lossy.kv_types",
    "lossy.tensor_classes",
    "models.trained_hybrid",
    "quality.healing",
    "quality.main_experts",
    "quality.seed_table",
    "quality.streams",
    "traces.layer_slots",
]
FURTHER = {"decode_prefill": ("--ratio", "2")}
"""Flags of smokes, for parts that a bench leaves out without them."""
Smoke = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """Runs a bench in its smoke mode, once, and gives its last line's document."""

    @functools.cache
    def run(bench: str) -> dict[str, Any]:
        """In this process, which has loaded most of what benches import already."""
        directory, main = tmp_path_factory.mktemp(bench), import_module(f"bench.{bench}").main
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(directory))
            patch.setattr("tempfile.tempdir", None)
            # Threads wait for each other by spinning, which takes the cores from the tests beside.
            threads = ["--threads", "1"] if any(option.name == "threads" for option in main.params) else []
            handler, n_torch_threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
            done = CliRunner().invoke(main, ["--smoke", *threads, *FURTHER.get(bench, ())], catch_exceptions=False)
            signal.signal(signal.SIGTERM, handler)
            torch.set_num_threads(n_torch_threads)
        assert done.exit_code == 0, done.stderr
        assert list(directory.glob("**/*.gguf*")) == [], "the random model was not deleted"
        document = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(document, dict)
        return document

    return run


@pytest.mark.parametrize("bench", SCRIPTS)
def test_last_line_is_a_json_document(bench: str, smoke: Smoke) -> None:
    assert smoke(bench)


def test_gains_of_drafts_are_times_without_over_times_with(smoke: Smoke) -> None:
    texts = smoke("drafts.gain")["memory"]["memory"]
    assert texts["new"]["tokens_per_step"] == 1
    assert all(row["auto_vs_none"] == pytest.approx(row["none_ms"] / row["draft_ms"]) for row in texts.values())


def test_every_kind_of_tensor_loses_less_in_more_bits(smoke: Smoke) -> None:
    kinds = smoke("lossy.tensor_classes")["kinds"]
    assert {"token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "output"} < set(kinds)
    assert all(0 < row["kl"]["Q8_0"] < row["kl"]["Q4_K"] for row in kinds.values())
    # With the bits that each kind is worth, a byte more helps all of them alike.
    slopes = [row["kl"]["Q4_K"] / row["weights"] / 4 ** row["bits_more"] for row in kinds.values()]
    assert slopes == pytest.approx([slopes[0]] * len(slopes))


def test_a_bench_runs_by_its_modules_name() -> None:
    command = [sys.executable, "-m", "bench.disk_speed", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)


def test_decode_prefill_measures_working_candidates(smoke: Smoke) -> None:
    document = smoke("decode_prefill")
    assert document["kl_vs_llamacpp"] < 1e-2
    assert 0 < document["python_share"] < 1
    assert 0 < document["in_slots"]["python_share"] < 1
    assert document["in_slots"]["decode_vs_memory"] > 0
    assert document["machine"]["cores"] >= 1
    for figures in document["depths"].values():
        best = min(ms for name, ms in figures["decode_ms"].items() if name != "slimoe")
        assert figures["decode_vs_llamacpp"] == pytest.approx(best / figures["decode_ms"]["slimoe"])
        assert figures["decode_vs_llamacpp"] >= document["decode_vs_llamacpp"]
        assert figures["prefill_vs_llamacpp"] >= document["prefill_vs_llamacpp"]
    (limited,) = document["larger_than_memory"]["limits"].values()
    assert limited["candidates"]["slimoe"]["ms_per_token"] > 0
    assert limited["same_choices"] == 1


def test_the_engine_is_equal_to_others(smoke: Smoke) -> None:
    document = smoke("equality")
    assert document["max_logit_difference"] < 1e-3
    assert document["greedy_tokens_equal"] == document["greedy_tokens"]
    for figures in document["kl_by_type"].values():
        assert max(figures["mean"], figures["single_mean"]) < 1e-4


def test_server_and_engine_answer_alike(smoke: Smoke) -> None:
    document = smoke("server_latency")
    assert document["same_text"]
    overhead = document["sse_ms_per_token"] - document["engine_ms_per_token"]
    assert document["sse_overhead_over_engine_alone_ms"] == pytest.approx(overhead)


def test_openai_python_works(smoke: Smoke) -> None:
    document = smoke("api.client_matrix")
    cells = document["rows"][0]["cells"]
    assert document["n_working"] == document["n_cells"] == len(cells), cells
    assert {"chat", "stream", "tools", "schema", "usage", "errors", "cancel", "responses"} == set(cells)


def test_every_shape_is_the_one_that_the_file_has(tmp_path: Path) -> None:
    """gguf's own reader and llama.cpp agree with the shape; two seeds differ, one seed does not."""
    shape = SHAPES["smoke"]
    paths = [tmp_path / name for name in ("a.gguf", "again.gguf", "b.gguf")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        write_random_model(path, shape.spec, seed=seed, kind="Q4_0", output="Q6_K")
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again
    assert first != other
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(paths[0]).tensors}
    down = tensors["blk.1.ffn_down_exps.weight"]
    assert down.tensor_type.name == "Q4_0"
    assert tuple(down.shape) == (shape.n_ff, shape.n_embd, shape.n_expert)
    assert tensors["output.weight"].tensor_type.name == "Q6_K"
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    experts = gguf.quants.dequantize(down.data, down.tensor_type).reshape(shape.n_expert, -1)
    assert np.std(experts, axis=1) == pytest.approx(shape.n_ff**-0.5, rel=0.05)
    assert abs(np.corrcoef(experts) - np.eye(shape.n_expert)).max() < 0.05


NAMES = ["qwen2moe", "granitemoe", "minimax-m2", "glm4moe", "bailingmoe2", "deepseek2", "gpt-oss"]
NAMES += ["qwen3next", "granitehybrid", "nemotron_h_moe"]


@pytest.mark.parametrize("name", NAMES)
def test_random_models_have_any_architecture(tmp_path: Path, name: str) -> None:
    """llama.cpp loads them and computes what the engine does, with rows that Q4_K does not divide among them."""
    shape = FineShape(n_layer=3, n_ff=96, n_head_kv=4, n_embd_head=64, n_expert=8, n_expert_used=2)
    path, tokens = tmp_path / "random.gguf", random_tokens(9, shape.n_vocab)
    spec = ModelSpec.from_gguf(read_gguf(write_family(tmp_path / "family.gguf", name, shape=shape)))
    write_random_model(path, spec, kind="Q4_K,Q8_0")
    assert ModelSpec.from_gguf(read_gguf(path)) == spec
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types >= {"Q4_K", "Q8_0", "F32"}
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False))) as baseline:
        expected = baseline.score(tokens)
    with closing(Engine.open(engine_config(path, n_ctx=256, n_threads=1, weights="copied"))) as engine:
        np.testing.assert_array_equal(engine.read(tokens, len(tokens)), expected)
    assert 0.3 < expected.std() < 3


@pytest.mark.parametrize("name", ["qwen35moe", "glm4moe"])
def test_random_models_may_have_a_block_that_drafts(tmp_path: Path, name: str) -> None:
    path, shape = tmp_path / "block.gguf", FineShape(n_layer=3, n_embd_head=64, n_expert=8, n_expert_used=2)
    spec = ModelSpec.from_gguf(read_gguf(write_family(tmp_path / "family.gguf", name, shape=shape)))
    write_random_model(path, with_mtp_layer(spec), kind="Q8_0")
    request = GenerationRequest((5, 9, 30, 7), 9, SamplingParams(temperature=0.0), ignore_eos=True)
    with closing(Engine.open(engine_config(path, n_ctx=256, n_threads=1, draft="mtp"))) as engine:
        assert engine.plan.mtp is not None
        assert not engine.plan.mtp.has_output
        *_, end = engine.generate(request)
    assert isinstance(end, Finished)
    assert end.timings.draft_n > 0


@pytest.mark.parametrize("name", ["lfm2moe", "nemotron_h_moe"])
def test_random_native_models_have_layers_without_experts(tmp_path: Path, name: str) -> None:
    path, shape = tmp_path / "native.gguf", FineShape(n_layer=5, n_embd_head=64, n_expert=8, n_expert_used=2)
    stock = ModelSpec.from_gguf(read_gguf(write_family(tmp_path / "family.gguf", name, shape=shape)))
    write_random_native(path, stock, ["Q4_K", "Q2_K"])
    found = ModelSpec.from_gguf(read_gguf(path))
    assert [found.layer_shape(n) for n in range(5)] == [stock.layer_shape(n) for n in range(5)]
    assert {found.layer_shape(n).n_expert for n in range(5)} == {0, 8}
    with closing(Engine.open(engine_config(path, n_ctx=256, n_threads=1))) as engine:
        assert 0.3 < engine.read(random_tokens(9, shape.n_vocab), 9).std() < 3


@pytest.mark.parametrize("name", FINE_MODELS)
def test_models_of_true_shape_are_read_as_what_they_are(name: str) -> None:
    """By their keys and tensors alone: the files have gigabytes."""
    spec = FINE_MODELS[name]()
    tensors = {
        tensor.name: TensorInfo(tensor.name, tensor.ne, tensor.type, 0, 0, tensor.n_bytes)
        for tensor in random_tensors(spec, WeightTypes.parse("Q4_K"), STYLES["uniform"])
    }
    gguf_file = GGUFFile((Path("m.gguf"),), {"general.architecture": name} | spec.metadata(), tensors)
    assert ModelFile.of(gguf_file).spec == spec


@pytest.mark.parametrize("extra_buffers", [True, False])
def test_baseline_steps_agree_with_its_prefill(tmp_path: Path, extra_buffers: bool) -> None:
    path = tmp_path / "model.gguf"
    write_random_model(path, SHAPES["smoke"].spec, vocabulary=True)
    baseline = LlamaCpp(LlamaCppConfig(path, n_ctx=256, n_threads=1, extra_buffers=extra_buffers))
    tokens = random_tokens(12, baseline.n_vocab)
    at_once = baseline.prefill(tokens).copy()
    assert baseline.n_past == 12
    go_to_depth(baseline, tokens, 11)
    stepped = baseline.decode(tokens[-1]).copy()
    baseline.close()
    assert np.isfinite(at_once).all()
    assert 0.5 < at_once.std() < 2
    assert kl_divergence(stepped, at_once) < 1e-2


def test_kl_divergence_by_hand() -> None:
    even, three_to_one = np.log(np.array([0.5, 0.5])), np.log(np.array([0.75, 0.25]))
    assert kl_divergence(even + 3, even) == pytest.approx(0, abs=1e-6)
    assert kl_divergence(three_to_one, even) == pytest.approx(0.5 * np.log(4 / 3), rel=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["decode_prefill", "--type", "IQ1_S"],
        ["decode_prefill", "--model", "missing.gguf"],
        ["decode_prefill", "--tokens", "4"],
    ],
)
def test_mistakes_are_answered_in_a_sentence(arguments: list[str]) -> None:
    done = CliRunner().invoke(import_module(f"bench.{arguments[0]}").main, [*arguments[1:], "--smoke"])
    assert done.exit_code not in (0, 1)
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""


def test_speed_of_compressed_files_has_its_old_names_too(smoke: Smoke) -> None:
    document = smoke("compress_speed")
    assert document["compressed_vs_f16"]
    for base in ("f16", "q4k"):
        assert document[f"slim_vs_{base}"] == document[f"compressed_vs_{base}"]


@pytest.mark.parametrize("bench", ["offload", "copies_quality"])
def test_two_copies_have_their_old_name_too(bench: str, smoke: Smoke) -> None:
    document = smoke(bench)
    assert document["pair"] == document["copies"]


def test_figures_of_routing_have_their_old_names_too(smoke: Smoke) -> None:
    for figures in (smoke("routing_stats")["mean"], smoke("routing_stats")["by_layer"]):
        assert figures["first_share"] == figures["first_weight"]
        assert figures["repeat_pick"] == figures["repeat_selected"]


def test_faults_of_the_system_end_in_right_results_or_clear_errors(smoke: Smoke) -> None:
    document = smoke("system_faults")
    assert document["found"] == []
    assert document["cases"] == document["clear_errors"] + document["right_results"] == 12
    assert document["not_met"] == 0
    assert set(document["by_command"]) == {"convert", "run", "inspect"}
