"""What `bench.compress_speed` computes from its figures, against published sizes and by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFWriter

from bench.compress_speed import main
from bench.models.shapes import SHAPES
from bench.quality.compress_projection import (
    CARD_BANDWIDTH,
    WHOLE,
    Calibrated,
    Density,
    Rates,
    Weights,
    calibration_of,
    conversion_of,
    decoding_of,
)
from bench.quality.compress_step import ConversionJob, Laps, StepFailedError, Taken, run_step
from tests.models.gguf_content import finish

SHAPE = replace(SHAPES["smoke"], n_layer=3)


def taken(layers: float, sensitivity: float = 1.0) -> Taken:
    return Taken({"layers": layers, "sensitivity": sensitivity, "prices": 2.0, "types": 3.0}, 10**9, 1)


def calibrated(n_tokens: int, per_weight: float, per_product: float) -> Calibrated:
    """A calibration that took exactly as long as the formula says."""
    shape = replace(WHOLE["Mixtral-8x7B"], n_layer=4)
    one = Calibrated(shape, n_tokens, n_tokens // 2, 64, taken(0.0))
    seconds = [
        per_weight * Weights.of(shape).total + factor * per_product * one.products(part)
        for part, factor in (("layers", 1), ("sensitivity", 5))
    ]
    return replace(one, taken=taken(*seconds))


@pytest.mark.parametrize(
    ("model", "billions", "active"), [("Mixtral-8x7B", 46.7, 12.9), ("Mixtral-8x22B", 140.6, 39.1)]
)
def test_whole_models_have_their_published_sizes(model: str, billions: float, active: float) -> None:
    weights = Weights.of(WHOLE[model])
    assert 1e-9 * weights.total == pytest.approx(billions, abs=0.05)
    assert 1e-9 * (weights.products(1) + 2 * weights.table) == pytest.approx(active, abs=0.1)


def test_rates_are_those_of_the_line_through_both_runs() -> None:
    short, long = (calibrated(n_tokens, 1e-9, 2e-12) for n_tokens in (256, 2048))
    rates = Rates.between(short, long, "layers")
    assert (rates.per_weight, rates.per_product) == pytest.approx((1e-9, 2e-12))


@pytest.mark.parametrize("seconds", [(5.0, 1.0), (0.001, 5.0)])
def test_noise_makes_no_rate_negative(seconds: tuple[float, float]) -> None:
    runs = [
        Calibrated(SHAPE, n_tokens, n_tokens, 1, taken(one)) for n_tokens, one in zip((8, 64), seconds, strict=True)
    ]
    rates = Rates.between(runs[0], runs[1], "layers")
    assert min(rates.per_weight, rates.per_product) >= 0
    total = rates.per_weight * Weights.of(SHAPE).total + rates.per_product * runs[1].products("layers")
    assert total == pytest.approx(seconds[1])


def test_calibration_of_eight_times_the_layers() -> None:
    whole = WHOLE["Mixtral-8x7B"]
    short, long = (calibrated(n_tokens, 1e-9, 1e-13) for n_tokens in (256, 2048))
    found = calibration_of(whole, short, long)
    weights = Weights.of(whole)
    read = 2 * 1e-9 * weights.total
    multiplied = 131072 * weights.products(1) + 2048 * weights.experts
    prices, tried = 2.0 * (32 * 28 + 2) / (4 * 28 + 2), 3.0 * 256
    expected = read + 1e-13 * (multiplied + 5 * 16384 * weights.products(1)) + prices + tried
    assert found["seconds"] == pytest.approx(expected, rel=0.01)
    assert found["seconds_with_card"] < found["seconds"]
    assert found["seconds_with_card"] > read + prices + tried


def test_conversion_grows_with_weights_and_memory_with_the_largest_matrix() -> None:
    measured, done = replace(WHOLE["Mixtral-8x7B"], n_layer=4), Taken({"write": 60.0}, 10**9, 1)
    small, large = (conversion_of(WHOLE[name], measured, done) for name in ("Mixtral-8x7B", "Mixtral-8x22B"))
    assert small["seconds"] == pytest.approx(60 * 46.70 / 6.067, rel=0.001)
    assert small["peak_resident"] == 10**9
    assert large["peak_resident"] == pytest.approx(1e9 * 6144 * 32768 / (4096 * 32000))


def test_density_counts_what_was_left_out_as_nothing(tmp_path: Path) -> None:
    """A file by gguf's own writer with the experts of one of three layers."""
    writer = GGUFWriter(tmp_path / "some.gguf", "llama")
    writer.add_block_count(SHAPE.n_layer)
    ff = (SHAPE.n_expert, SHAPE.n_ff, SHAPE.n_embd)
    for name in ("gate", "up", "down"):
        writer.add_tensor(f"blk.1.ffn_{name}_exps.weight", np.zeros(ff, np.float16))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", np.zeros((SHAPE.n_vocab, SHAPE.n_embd), np.float16))
    finish(writer)
    density = Density.of(tmp_path / "some.gguf", SHAPE)
    table = 2 * SHAPE.n_vocab * SHAPE.n_embd
    experts = 3 * 2 * SHAPE.n_expert * SHAPE.n_ff * SHAPE.n_embd
    assert density.n_bytes(SHAPE) == pytest.approx(experts + 2 * table)
    # Half of the experts, and not the token table, of which it reads one row.
    assert density.token_bytes(SHAPE) == pytest.approx(experts / 2 + table)


def test_decoding_where_everything_nothing_or_some_fits() -> None:
    whole, bandwidth = WHOLE["Mixtral-8x7B"], 20e9
    weights = Weights.of(whole)
    few, many = (Density(bits / 8, 0.5, 0.5) for bits in (2.5, 16))
    fits = decoding_of(whole, few, bandwidth, 24 << 30)
    assert fits["tokens_per_s"] == pytest.approx(bandwidth / few.token_bytes(whole))
    assert fits["tokens_per_s_with_card"] == pytest.approx(CARD_BANDWIDTH / few.token_bytes(whole))
    beyond = decoding_of(whole, many, bandwidth, 24 << 30)
    assert beyond["tokens_per_s"] is None
    assert beyond["tokens_per_s_with_card"] is None
    on_both = decoding_of(whole, many, bandwidth, 256 << 30)
    share = ((22 << 30) - 0.5 * (weights.attention + weights.table)) / (2 * weights.experts)
    assert on_both["experts_on_card"] == pytest.approx(share)
    slow = (1 - share) * 2 * weights.experts / 4 / bandwidth
    fast = (0.5 * (weights.attention + weights.table) + share * 2 * weights.experts / 4) / CARD_BANDWIDTH
    assert on_both["tokens_per_s_with_card"] == pytest.approx(1 / (slow + fast))


def test_laps_add_up_by_name() -> None:
    laps = Laps()
    for what in ("read", "read", "write", "read", ""):
        laps.now(what)
    assert list(laps.parts) == ["read", "write"]
    assert min(laps.parts.values()) >= 0


def test_unknown_types_are_answered_in_a_sentence() -> None:
    done = CliRunner().invoke(main, ["--types", "Q2_K,Q9_K", "--smoke"])
    assert done.exit_code == 2
    assert "'Q9_K' is no type to choose from" in done.output


def test_a_step_alone_says_what_it_took_or_why_it_failed(moe_checkpoint: Path, tmp_path: Path) -> None:
    job = ConversionJob(str(moe_checkpoint), str(tmp_path / "a.gguf"), "Q8_0", 1)
    taken = run_step(job)
    assert taken.n_bytes == (tmp_path / "a.gguf").stat().st_size
    assert taken.seconds > 0
    assert taken.peak_resident > 1 << 20
    assert set(taken.bytes_by_type) == {"Q8_0", "F32"}
    with pytest.raises(StepFailedError, match=r"The step convert of a\.gguf failed: .*exists"):
        run_step(job)


def test_old_spellings_are_understood() -> None:
    assert main.make_context("bench", ["--slim", "native"]).params["files"] == ("native",)
