"""Blocks with importance: llama.cpp's bytes, gguf's values, and what is refused."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from bench.baselines.llama_cpp import llama_quantize
from slimoe.converter.quant.mixes import RECIPES
from slimoe.converter.quant.quantize import (
    BadWeightsError,
    dequantize_rows,
    needs_importance,
    quantize_rows,
    usable_importance,
)
from slimoe.offload.errors import UsageError
from tests.models.gguf_content import file_tensors
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

Matrix = NDArray[np.float32]
QUANTISED = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4 NVFP4"
CODEBOOKS = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS"
ALL = [Type[name] for name in f"F32 F16 BF16 {QUANTISED} {CODEBOOKS}".split()]
SHAPE = TinyShape(n_layer=1, n_embd=256, n_ff=512, n_head=4, n_head_kv=4, n_expert=3, n_expert_used=2)


@pytest.fixture
def values() -> Matrix:
    return np.random.default_rng(1).standard_normal((6, 512), np.float32) * np.float32(1 / 16)


@pytest.fixture
def importance() -> Matrix:
    squares: Matrix = np.square(np.random.default_rng(2).random(512, np.float32))
    return squares + np.float32(1e-3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("quantise") / "tiny.gguf", None, shape=SHAPE)


@pytest.mark.parametrize(
    ("kind", "file_type", "with_importance"),
    [
        (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0, True),
        (Type.Q2_K, LlamaFileType.MOSTLY_Q2_K, True),
        (Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_S, False),
        (Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_S, True),
        (Type.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS, False),
        (Type.IQ3_S, LlamaFileType.MOSTLY_IQ3_S, True),
        (Type.IQ2_XXS, LlamaFileType.MOSTLY_IQ2_XXS, True),
    ],
)
def test_blocks_are_llama_cpps(
    tiny: Path, tmp_path: Path, kind: Type, file_type: LlamaFileType, with_importance: bool
) -> None:
    rng = np.random.default_rng(3)
    source = file_tensors(tiny)
    names = [name for name, tensor in source.items() if tensor.data.ndim > 1]
    imatrix = {}
    for name in names:
        experts = source[name].data.shape[0] if source[name].data.ndim == 3 else 1
        imatrix[name] = rng.random((experts, source[name].data.shape[-1]), np.float32) + np.float32(0.01)
    llama_quantize(tiny, tmp_path / "theirs.gguf", file_type, 1, imatrix if with_importance else None, pure=True)
    theirs = file_tensors(tmp_path / "theirs.gguf")
    compared = [name for name in names if theirs[name].tensor_type == kind]
    assert {"blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"} <= set(compared)
    for name in compared:
        data = source[name].data.reshape(len(imatrix[name]), -1, source[name].data.shape[-1])
        for expert, weights in enumerate(data):
            ours = quantize_rows(np.array(weights), kind, imatrix[name][expert] if with_importance else None)
            their = theirs[name].data.reshape(len(data), -1)[expert]
            assert np.array_equal(ours, their), f"{name}[{expert}]"


def random_blocks(kind: Type, n_blocks: int) -> NDArray[np.uint8]:
    """Bytes that decode to numbers; so codebooks, which take ggml long to search, need not be searched."""
    rng = np.random.default_rng(6)
    blocks = rng.integers(0, 256, (8 * n_blocks, GGML_QUANT_SIZES[kind][1]), np.uint8)
    size = np.abs(dequantize_rows(blocks.reshape(-1), kind, GGML_QUANT_SIZES[kind][0])).max(1)
    good: NDArray[np.uint8] = blocks[np.isfinite(size) & (size < 1e9)][:n_blocks]
    assert len(good) == n_blocks
    return good


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_values_are_those_of_the_public_reader(kind: Type) -> None:
    block = GGML_QUANT_SIZES[kind][0]
    blocks = random_blocks(kind, 12)
    theirs = gguf.dequantize(blocks, kind)
    assert np.array_equal(dequantize_rows(blocks.reshape(-1), kind, 4 * block), theirs.reshape(3, 4 * block))


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q4_0, Type.IQ3_S, Type.IQ4_XS], ids=lambda kind: kind.name)
def test_importance_lowers_the_weighted_error(values: Matrix, importance: Matrix, kind: Type) -> None:
    def cost(blocks: NDArray[np.uint8]) -> float:
        return float((np.square(dequantize_rows(blocks, kind, 512) - values) * importance).sum())

    assert cost(quantize_rows(values, kind, importance)) < cost(quantize_rows(values, kind))


@pytest.mark.parametrize("kind", [Type.IQ2_XXS, Type.IQ3_XXS, Type.IQ4_XS, Type.Q2_K], ids=lambda kind: kind.name)
def test_unseen_columns_count_like_the_mean_one(values: Matrix, importance: Matrix, kind: Type) -> None:
    zeros = np.zeros_like(importance)
    assert np.array_equal(quantize_rows(values, kind, zeros), quantize_rows(values, kind, zeros + 1))
    partly = np.where(np.arange(512) % 5 == 0, zeros, importance)
    filled = np.where(partly == 0, partly.sum(dtype=np.float64) / np.count_nonzero(partly), partly).astype(np.float32)
    assert np.array_equal(quantize_rows(values, kind, partly), quantize_rows(values, kind, filled))


def test_the_scale_of_importance_does_not_matter(values: Matrix, importance: Matrix) -> None:
    for kind in (Type.Q2_K, Type.IQ2_XXS, Type.IQ3_XXS):
        expected = quantize_rows(values, kind, importance)
        for exponent in (-70, 70):
            assert np.array_equal(quantize_rows(values, kind, np.ldexp(importance, exponent)), expected)
    assert np.array_equal(usable_importance(importance), importance)


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"])
def test_the_smallest_types_refuse_to_guess(values: Matrix, name: str) -> None:
    assert needs_importance(Type[name])
    with pytest.raises(UsageError, match=f"{name} .*--imatrix"):
        quantize_rows(values, Type[name])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_numbers_are_refused(values: Matrix, importance: Matrix, bad: float) -> None:
    values[3, 5] = bad
    with pytest.raises(BadWeightsError, match="NaN or infinity"):
        quantize_rows(values, Type.IQ2_XXS, importance)


@pytest.mark.parametrize("kind", [Type.F16, Type.Q8_0, Type.Q2_K], ids=lambda kind: kind.name)
def test_weights_beyond_the_types_scales_are_refused(values: Matrix, kind: Type) -> None:
    with pytest.raises(BadWeightsError, match=f"{kind.name} can.* express; use BF16 or F32"):
        quantize_rows(values * np.float32(1e12), kind)


def test_rows_that_do_not_divide_into_blocks_are_refused(values: Matrix) -> None:
    with pytest.raises(BadWeightsError, match="rows of 96, which do not divide into blocks of 256"):
        quantize_rows(np.ascontiguousarray(values[:, :96]), Type.Q4_K)


@pytest.mark.parametrize(
    "kind", [kind for kind in GGML_QUANT_SIZES if kind.name in RECIPES or kind.name in ("Q5_0", "Q5_1", "Q4_1")]
)
@pytest.mark.parametrize("size", [7e4, 1e20, 3e38])
def test_weights_beyond_a_half_are_refused_alike(kind: Type, size: float) -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (2, 256)).astype(np.float32)
    rows[1, 200] = size
    if kind.name in ("F32", "BF16") and size < 3.3e38:
        decoded = dequantize_rows(quantize_rows(rows, kind), kind, 256)
        assert decoded[1, 200] == pytest.approx(size, rel=0.01)
        return
    with pytest.raises(BadWeightsError, match=f"holds weights beyond 65504, which {kind.name} cannot express"):
        quantize_rows(rows, kind, np.ones(256, np.float32))
    rows[1, 200] = 65504
    decoded = dequantize_rows(quantize_rows(rows, kind, np.ones(256, np.float32)), kind, 256)
    assert np.isfinite(decoded).all()
    assert decoded[1, 200] > 10_000
