"""The block that predicts a further token computes what llama.cpp's MTP context does, to the last bit."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from bench.baselines.llama_cpp_mtp import LlamaCppMtp
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.graph.batch import Batch, make_batch
from slimoe.offload.graph.mtp import MtpRunner
from slimoe.offload.loaded_model import LoadedModel
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.model.mtp_block import mtp_block
from slimoe.offload.plan.engine_plan import plan_engine
from tests.models.configs import engine_config
from tests.models.gguf_content import read_content, write_content
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.drafted import with_mtp_block, with_second_block

SHAPE = FineShape(n_layer=3, n_embd_head=64, n_expert=8, n_expert_used=2)
FAMILIES = ("glm4moe", "qwen3next", "qwen35moe", "deepseek2", "deepseek32", "glm-dsa")
TOKENS = (5, 9, 30, 7, 22, 41, 8, 19, 60, 3, 77, 14)
N_EMBD = 256


def write(path: Path, name: str, **changed: bool) -> Path:
    content = read_content(write_family(path.with_suffix(".plain"), name, shape=SHAPE))
    return write_content(path, with_mtp_block(content, SHAPE.n_layer, **changed))


@contextmanager
def opened(path: Path) -> Iterator[tuple[LoadedModel, MtpRunner]]:
    config = engine_config(path, n_ctx=256, n_batch=64, n_threads=1, draft="mtp")
    with closing(LoadedModel(config, plan_engine(config), lambda done, total: None)) as model:
        assert model.mtp is not None
        yield model, model.mtp


def batch_of(tokens: Sequence[int], begin: int, states: Sequence[tuple[int, int]] = ()) -> Batch:
    return make_batch([(tokens, np.arange(begin + len(tokens)))], 1, states)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("own", [False, True], ids=["the model's output", "its own output"])
def test_the_block_is_llama_cpps(tmp_path: Path, name: str, own: bool) -> None:
    path = write(tmp_path / "m.gguf", name, has_own_ends=own)
    with closing(LlamaCppMtp(path)) as theirs, opened(path) as (model, block):
        wanted = theirs.hidden(TOKENS)
        model.runner.run(batch_of(TOKENS, 0, ((0, 1),) if name.startswith("qwen") else ()))
        hidden = model.runner.hidden.copy()
        np.testing.assert_array_equal(hidden, wanted)
        before = np.concatenate([np.zeros((1, N_EMBD), np.float32), hidden[:-1]])
        theirs.predict(TOKENS, before, 0)
        block.store(batch_of(TOKENS, 0), before)
        # Each prediction goes on from the block's own hidden states.
        token, last, place = 50, hidden[-1:], len(TOKENS)
        for _ in range(3):
            expected, after = theirs.predict((token,), last, place)
            logits, own_after = block.predict(batch_of((token,), place), last)
            assert expected.std() > 0.1
            np.testing.assert_array_equal(logits, expected)
            np.testing.assert_array_equal(own_after, after)
            token, last, place = int(expected[0].argmax()), after, place + 1


def test_of_two_blocks_the_first_is_run(tmp_path: Path) -> None:
    """It predicts what it does alone, beside a second one of other numbers."""
    one = read_content(write(tmp_path / "one.gguf", "deepseek32"))
    two = with_second_block(one, SHAPE.n_layer)
    name = f"blk.{SHAPE.n_layer + 1}.nextn.eh_proj.weight"
    path = write_content(tmp_path / "two.gguf", two.with_values({name: np.zeros((N_EMBD, 2 * N_EMBD), np.float32)}))
    before = np.zeros((len(TOKENS), N_EMBD), np.float32)
    with opened(tmp_path / "one.gguf") as (_, block):
        logits, last = block.predict(batch_of(TOKENS, 0), before)
    with opened(path) as (_, block):
        assert block.spec.n_layer_nextn == 1
        own_logits, own_last = block.predict(batch_of(TOKENS, 0), before)
    assert logits.std() > 0.1
    np.testing.assert_array_equal(own_logits, logits)
    np.testing.assert_array_equal(own_last, last)


def test_a_block_with_another_shape_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "glm4moe")
    content = read_content(path)
    name = f"blk.{SHAPE.n_layer}.nextn.eh_proj.weight"
    spoilt = write_content(tmp_path / "spoilt.gguf", content.with_values({name: np.ones((N_EMBD, 64), np.float32)}))
    file = ModelFile.of(read_gguf(spoilt))
    with pytest.raises(ModelFileError, match=r"nextn\.eh_proj\.weight has the shape \(64, 256\)"):
        mtp_block(file.gguf, file.spec, file.sources)
    with closing(Engine.open(engine_config(spoilt, n_ctx=256, n_threads=1))) as engine:
        assert engine.spec.n_layer_nextn == 1, "who does not ask for the block does not look at it"
