"""A block as one function says what the streamed pass does, and its gradients are differences of what it says."""

from collections.abc import Sequence

import pytest
import torch

from slimoe.converter.budget.compressed_experts import CompressedSource
from slimoe.converter.forward.expert import AuxVectors
from slimoe.converter.forward.stream import Observer, Stream
from slimoe.converter.forward.tensor_source import TensorSource
from slimoe.converter.forward.whole_block import pass_block
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.model_source import ModelSource, block_key
from tests.models.naive_layer import SIZES, TEXTS, biased_model
from tests.models.tiny_gguf import FineShape, write_family

LENGTHS = [len(one) for one in TEXTS.tokens]


def streamed(source: ModelSource) -> Sequence[torch.Tensor]:
    """The hidden states before each layer and behind the last."""
    stream = Stream(source, TEXTS)
    stream.embed()
    found = [stream.h.clone()]
    for layer in range(source.spec.n_layer):
        stream.pass_layer(layer, Observer())
        found.append(stream.h.clone())
    return found


def assert_blocks_are_alike(source: ModelSource) -> None:
    states, model = streamed(source), TensorSource(source)
    for layer in range(source.spec.n_layer):
        found = pass_block(model, layer, states[layer], LENGTHS)
        torch.testing.assert_close(found, states[layer + 1], atol=1e-4, rtol=1e-4)


def test_a_block_of_compressed_experts() -> None:
    torch.manual_seed(2)
    shape = SIZES.n_expert, SIZES.n_embd
    vectors = {0: AuxVectors(0.3 * torch.randn(shape), 0.3 * torch.randn(shape))}
    assert_blocks_are_alike(CompressedSource(biased_model(), 1, vectors))


@pytest.mark.parametrize("family", ["glm4moe", "gpt-oss", "granitemoe", "qwen3next", "lfm2moe", "gemma4"])
def test_blocks_of_other_architectures(tmp_path_factory: pytest.TempPathFactory, family: str) -> None:
    """Dense layers and shared experts, biases and sinks, multipliers, norms behind parts."""
    path = tmp_path_factory.mktemp(family) / "m.gguf"
    assert_blocks_are_alike(gguf_source(write_family(path, family, shape=FineShape(n_layer=2, n_expert=8))))


def test_gradients_are_differences() -> None:
    source = biased_model()
    model, key = TensorSource(source), block_key(0, "ffn_norm")
    model.train([key])
    h = streamed(source)[0]
    loss = pass_block(model, 0, h, LENGTHS).square().sum()
    (gradient,) = torch.autograd.grad(loss, [model.trained[key]])
    step = torch.zeros(SIZES.n_embd)
    step[3] = 1e-2
    sides = []
    for sign in (1, -1):
        moved = source.changed({key: source.read(key) + sign * step.numpy()})
        sides.append(float(pass_block(TensorSource(moved), 0, h, LENGTHS).double().square().sum()))
    torch.testing.assert_close(float(gradient[3]), (sides[0] - sides[1]) / 2e-2, rtol=0.02, atol=1.0)
