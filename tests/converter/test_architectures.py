"""Each architecture's row means the same to torch, to the converter and to the engine."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.forward.stream import Sequences, final_logits, run
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.offload.engine import Engine
from slimoe.offload.gguf.header import read_gguf
from tests.models.configs import engine_config
from tests.models.gguf_content import Array
from tests.models.tiny_gguf import FAMILIES, FineShape, write_family

TOKENS = random_tokens(40, 300)
SHAPE = FineShape(n_expert=16)
CONVERTED = [name for name, family in FAMILIES.items() if family.latent is None and name != "gpt-oss"]


def logits(path: Path) -> Array:
    with closing(Engine.open(engine_config(path, n_ctx=64, n_threads=1, kv_type="f32", weights="copied"))) as engine:
        return engine.read(TOKENS, len(TOKENS)).copy()


@pytest.mark.parametrize("name", CONVERTED)
def test_torch_computes_what_the_engine_does(tmp_path: Path, name: str) -> None:
    path = write_family(tmp_path / "m.gguf", name, shape=SHAPE)
    source = gguf_source(path)
    ours = final_logits(source, run(source, Sequences((tuple(TOKENS),)))).numpy()
    np.testing.assert_allclose(ours, logits(path), atol=1e-3)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_file_is_of_the_same_architecture(tmp_path: Path, name: str) -> None:
    path = write_family(tmp_path / "m.gguf", name, shape=FineShape(n_head_kv=4, n_embd_head=64, n_expert=16))
    result = convert(ConvertOptions(path, tmp_path / "q8.gguf", "Q8_0", n_threads=1)).path
    assert read_gguf(result).metadata["general.architecture"] == name
    with closing(LlamaCpp(LlamaCppConfig(result, 256, 1, extra_buffers=False))) as baseline:
        expected = baseline.score(TOKENS)
    with closing(Engine.open(engine_config(result, n_ctx=256, n_threads=1, weights="copied"))) as engine:
        np.testing.assert_array_equal(engine.read(TOKENS, len(TOKENS)), expected)
    direct = write_family(tmp_path / "d.gguf", name, Type.Q8_0, FineShape(n_head_kv=4, n_embd_head=64, n_expert=16))
    np.testing.assert_array_equal(logits(result), logits(direct))
