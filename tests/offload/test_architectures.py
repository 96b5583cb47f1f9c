"""Each architecture's row computes what llama.cpp does of the same file, in memory, across tiers and as text."""

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from llama_cpp import Llama

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError, SlimoeError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.text.generation import Failed, GenerationRequest, SamplingParams, TokenStep
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, read_content, write_content
from tests.models.native_files import NativeFfn, StoredExpert, plain_ffn, write_native
from tests.models.tiered import resident_engine, tiered_engine
from tests.models.tiny_gguf import FAMILIES, FineShape, write_family

TOKENS = random_tokens(40, 300)
SHAPES = {name: FineShape(n_expert=16) for name in FAMILIES} | {
    "qwen2moe": FineShape(n_head_kv=4, n_embd_head=64, n_expert=16),
    "qwen3moe": FineShape(n_expert=48),
    "olmoe": FineShape(n_head_kv=4, n_embd_head=64),
    "phimoe": FineShape(n_embd_head=64, n_expert=16),
    "dots1": FineShape(n_head_kv=4, n_expert=16),
    "bailingmoe2": FineShape(n_embd_head=64, n_expert=16),
    # llama.cpp takes queries for one matrix where a model has as many layers as DeepSeek-V2-Lite or a few others.
    "deepseek2-lite": FineShape(n_layer=26, n_ff=32, n_expert=6, n_expert_used=2),
    "qwen3next": FineShape(n_layer=4, n_expert=16),
    "qwen3next-old": FineShape(n_layer=4, n_expert=16),
    "qwen35moe": FineShape(n_layer=4, n_expert=16),
    "lfm2moe": FineShape(n_layer=4, n_embd_head=64, n_expert=16),
    "granitehybrid": FineShape(n_layer=4, n_expert=16),
    "nemotron_h_moe": FineShape(n_layer=5, n_expert=16),
    "nemotron_h_moe-latent": FineShape(n_layer=5, n_expert=16),
    "gemma4": FineShape(n_layer=4, n_head_kv=1, n_expert=16),
    "gpt-oss": FineShape(n_embd=96, n_ff=160, n_head_kv=1, n_embd_head=64, n_expert=16, n_expert_used=4),
}
FINE = ("qwen3moe", "olmoe")
WORDS = ("re", "in", "on", "at")
Written = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The file of an architecture in a type, by the names of both; it is written once."""
    directory = tmp_path_factory.mktemp("architectures")

    @functools.cache
    def write(name: str, kind: str) -> Path:
        return write_family(directory / f"{name}-{kind}.gguf", name, Type[kind], SHAPES[name])

    return write


KINDS = [(name, "MXFP4" if name == "gpt-oss" else "Q4_K") for name in FAMILIES]
KINDS += [(name, kind) for name in ("llama", *FINE) for kind in ("F32", "Q8_0")]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request: pytest.FixtureRequest, written: Written) -> Path:
    return written(*request.param)


def config(path: Path, **changed: Any) -> EngineConfig:
    return engine_config(path, **{"n_ctx": 256, "n_threads": 1} | changed)


def told(engine: Engine, parts: Sequence[Sequence[int]]) -> Array:
    """The logits of all tokens, read in parts."""
    with closing(engine):
        return np.concatenate([engine.read(part, len(part)).copy() for part in parts])


def llama_cpps(path: Path, parts: Sequence[Sequence[int]], *, repack: bool) -> Array:
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=repack))) as baseline:
        return np.concatenate([baseline.score(part) for part in parts])


WHOLE = [TOKENS]
SINGLE = [[token] for token in TOKENS]
MIXED = [TOKENS[:9], TOKENS[9:26], *SINGLE[26:]]


@pytest.mark.parametrize(
    ("parts", "weights", "repack"),
    [
        (WHOLE, "copied", False),
        (SINGLE, "copied", False),
        (MIXED, "mapped", False),
        (WHOLE, "repacked", True),
        (SINGLE, "both", True),
    ],
    ids=["whole", "single", "mixed", "whole repacked", "single repacked"],
)
def test_logits_are_llama_cpps_to_the_last_bit(
    model: Path, parts: Sequence[Sequence[int]], weights: str, repack: bool
) -> None:
    expected = llama_cpps(model, parts, repack=repack)
    assert expected.std() > 0.5, "logits that are all alike show nothing"
    np.testing.assert_array_equal(told(Engine.open(config(model, weights=weights)), parts), expected)


@pytest.mark.parametrize("parts", [WHOLE, MIXED], ids=["whole", "mixed"])
def test_tiers_change_no_bit(model: Path, parts: Sequence[Sequence[int]]) -> None:
    expected = told(resident_engine(config(model)), parts)
    for share in (0, 0.5, 1):
        found = told(tiered_engine(config(model), share), parts)
        np.testing.assert_array_equal(found, expected, f"with slots for {share} of the experts")


@pytest.mark.parametrize("name", FINE)
def test_native_files_name_the_architecture_that_they_were_made_from(
    tmp_path: Path, written: Written, name: str
) -> None:
    stock = read_content(written(name, "F32"))
    n_expert = SHAPES[name].n_expert
    layers = [plain_ffn(n_expert)] * SHAPES[name].n_layer
    path = write_native(tmp_path / "native.gguf", stock, layers)
    assert read_gguf(path).metadata["slimoe.base_architecture"] == name
    expected = told(Engine.open(config(written(name, "F32"), weights="copied")), MIXED)
    np.testing.assert_array_equal(told(Engine.open(config(path, weights="copied")), MIXED), expected)
    fewer = NativeFfn(tuple(StoredExpert(e) for e in range(n_expert // 2)), tuple(range(n_expert // 2)))
    path = write_native(tmp_path / "fewer.gguf", stock, [fewer, *layers[1:]])
    whole = told(Engine.open(config(path, weights="copied")), MIXED)
    np.testing.assert_array_equal(told(tiered_engine(config(path), 0.3), MIXED), whole)
    assert not np.array_equal(whole, expected)


def test_a_native_file_of_an_unknown_architecture_is_refused(tmp_path: Path, written: Written) -> None:
    stock = read_content(written("olmoe", "F32"))
    path = write_native(tmp_path / "native.gguf", stock, [plain_ffn(32)] * 3)
    content = read_content(path).with_keys({"slimoe.base_architecture": "rwkv"})
    with pytest.raises(SlimoeError, match=r"'rwkv' is not supported\. Those that are: llama"):
        ModelFile.of(read_gguf(write_content(tmp_path / "m.gguf", content)))


@pytest.mark.parametrize(
    ("name", "tensor", "ne"),
    [
        ("qwen3moe", "blk.1.attn_q_norm.weight", (128,)),
        ("qwen3moe", "blk.2.attn_k_norm.weight", (128,)),
        ("olmoe", "blk.1.attn_q_norm.weight", (256,)),
        ("olmoe", "blk.0.attn_k_norm.weight", (256,)),
    ],
)
def test_norms_of_queries_and_keys_are_checked(tmp_path: Path, name: str, tensor: str, ne: tuple[int, ...]) -> None:
    content = read_content(write_family(tmp_path / "whole.gguf", name, shape=replace(SHAPES[name], n_expert=8)))
    assert content.values(tensor).shape == ne
    with pytest.raises(ModelFileError, match=f"tensor {tensor} is missing"):
        ModelFile.of(read_gguf(write_content(tmp_path / "m.gguf", content.with_values({tensor: None}))))
    wrong = content.with_values({tensor: np.ones(64, np.float32)})
    with pytest.raises(ModelFileError, match=f"tensor {tensor} has the shape"):
        ModelFile.of(read_gguf(write_content(tmp_path / "m.gguf", wrong)))


def test_a_width_without_its_key_is_the_dense_one_over_the_experts_used(tmp_path: Path) -> None:
    shape = replace(SHAPES["qwen3moe"], n_expert=16, n_ff=64, n_layer=1)
    content = read_content(write_family(tmp_path / "whole.gguf", "qwen3moe", shape=shape))
    keys = {"qwen3moe.expert_feed_forward_length": None, "qwen3moe.feed_forward_length": 64 * shape.n_expert_used}
    path = write_content(tmp_path / "m.gguf", content.with_keys(keys))
    assert ModelFile.of(read_gguf(path)).spec.n_ff == 64
    expected = llama_cpps(path, WHOLE, repack=False)
    np.testing.assert_array_equal(told(Engine.open(config(path, weights="copied")), WHOLE), expected)


@pytest.mark.parametrize("name", FINE)
def test_without_experts_it_is_refused(tmp_path: Path, name: str) -> None:
    content = read_content(write_family(tmp_path / "whole.gguf", name, shape=replace(SHAPES[name], n_expert=8)))
    path = write_content(tmp_path / "m.gguf", content.with_keys({f"{name}.expert_count": None}))
    with pytest.raises(ModelFileError, match="expert_count is missing"):
        ModelFile.of(read_gguf(path))


@pytest.mark.parametrize("name", [*FINE, "deepseek2"])
def test_text_goes_in_and_out_as_llama_cpp_has_it(tmp_path: Path, name: str) -> None:
    """A byte-level vocabulary cut as Qwen's, whose texts no token opens."""
    path = write_family(tmp_path / "m.gguf", name, shape=SHAPES[name], words=WORDS)
    llama = Llama(str(path), n_ctx=64, verbose=False, n_threads=1)
    prompt = llama.tokenize("rain on 12 réroofs".encode(), add_bos=False)
    command = [sys.executable, "-m", "slimoe.server.cli", "run", str(path), "-p", "rain on 12 réroofs", "--json"]
    command += ["-n", "6", "--temp", "0", "--threads", "1", "--ignore-eos"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["timings"]["prompt_n"] == len(prompt) < len("rain on 12 réroofs")
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1))) as baseline:
        expected = [int(baseline.prefill(prompt).argmax())]
        while len(expected) < 6:
            expected.append(int(baseline.decode(expected[-1]).argmax()))
    assert report["tokens"] == expected


ODD_VALUES: tuple[Any, ...] = (
    *(np.array(values) for values in ([3, 3, 3], [2], [2, 2], [2.5, 2.5], [])),
    *("x", ["a", "b"], math.nan, -1, 0, 2.5, True, 1 << 40),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_key_of_any_other_form_is_read_or_refused(written: Written, name: str) -> None:
    """Every key of the file in turn: what is refused is refused in one of our own errors, at once."""
    file = read_gguf(written(name, "MXFP4" if name == "gpt-oss" else "Q4_K"))
    n_refused = 0
    for key in file.metadata:
        for value in ODD_VALUES:
            try:
                ModelFile.of(replace(file, metadata={**file.metadata, key: value}))
            except SlimoeError as error:
                n_refused += "\n" not in str(error)
    assert n_refused > 100


@pytest.mark.parametrize("name", [*FINE, "mistral4", "gpt-oss", "gemma4"])
@pytest.mark.parametrize("is_tiered", [False, True])
def test_requests_at_once_have_the_answers_that_each_has_alone(written: Written, name: str, is_tiered: bool) -> None:
    path = written(name, "F32")
    several = config(path, n_parallel=3, kv_type="f32", weights="copied")
    prompts = [TOKENS[:7], TOKENS[7:30], TOKENS[30:33]]
    answers: dict[int, list[int]] = {}
    with closing(tiered_engine(several, 0.3) if is_tiered else Engine.open(several)) as engine:
        params = SamplingParams(temperature=0.0)
        ids = [engine.submit(GenerationRequest(tuple(prompt), 8, params, ignore_eos=True)) for prompt in prompts]
        while not engine.is_idle:
            for id, event in engine.step():
                assert not isinstance(event, Failed), event.error
                if isinstance(event, TokenStep):
                    answers.setdefault(id, []).append(event.token)
    for id, prompt in zip(ids, prompts, strict=True):
        with closing(Engine.open(config(path, kv_type="f32", weights="copied"))) as alone:
            expected = [int(alone.prefill(prompt).argmax())]
            while len(expected) < 8:
                expected.append(int(alone.decode(expected[-1]).argmax()))
        assert answers[id] == expected
