"""What benches of quality understand and write beside their figures."""

from pathlib import Path

import torch

from bench.compress_quality import as_json, main
from bench.models.equal_heads import write_equal_heads
from bench.models.random_checkpoint import write_random_checkpoint
from bench.models.shapes import SHAPES
from bench.quality.healing import rows
from slimoe.converter.budget.compressed_experts import CompressedSource
from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.forward.windows import cut_windows
from slimoe.converter.report.evaluation import Reference
from slimoe.converter.source.model_source import active_weights
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.forward_pass import CalibrationSettings, calibrate
from slimoe.converter.stats.observer import Samples
from tests.models.compress_plans import random_sequences
from tests.models.tiny_checkpoint import TinyConfig, logits, save_fine


def test_the_old_name_of_the_baselines_is_understood_and_written() -> None:
    context = main.make_context("bench", ["--part", "rivals", "--part", "budgets"])
    assert context.params["parts"] == ("baselines", "budgets")
    document = as_json({"baselines": [{"name": "Q4_K_M", "kl_vs_llamacpp": 1.2}]})
    assert document["rivals"] == document["baselines"]
    assert document["kl_vs_llamacpp"] == {"Q4_K_M": 1.2}


def test_equal_heads_compute_what_shared_ones_do(tmp_path: Path) -> None:
    sizes = TinyConfig(n_layer=1)
    source = save_fine(tmp_path / "shared", "olmoe", sizes, num_key_value_heads=sizes.n_head // 2)
    write_equal_heads(source, tmp_path / "equal")
    expected, found = (logits(path, list(range(3, 30))) for path in (source, tmp_path / "equal"))
    torch.testing.assert_close(found, expected)
    assert open_source(tmp_path / "equal").spec.n_head_kv == sizes.n_head


def test_active_weights_are_all_but_those_of_experts_that_are_not_computed(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "c", SHAPES["smoke"])
    source, shape = open_source(tmp_path / "c"), SHAPES["smoke"]
    expert = 3 * shape.n_embd * shape.n_ff * shape.n_layer
    others = (shape.n_expert - shape.n_expert_used) * expert
    assert active_weights(source) == sum(torch.Size(one).numel() for one in source.shapes.values()) - others
    vectors = 2 * shape.n_embd * shape.n_layer
    assert active_weights(CompressedSource(source, 1)) == active_weights(source) - expert + vectors


def test_healing_has_rows_before_and_after(k_quant_checkpoint: Path, tmp_path: Path) -> None:
    source = open_source(k_quant_checkpoint)
    text = CalibrationText(random_sequences(4, 16, source.spec.n_vocab), ("random",) * 4)
    settings = CalibrationSettings(Samples(types=()), n_sensitivity=0)
    statistics = calibrate(source, text, settings, tmp_path / "partial")
    reference = Reference(source, cut_windows({"random": sum(statistics.tokens, ())}, length=16))
    found = list(rows(source, statistics, reference, ("dropped", "main"), (0.3,), tmp_path))
    assert [(row["kind"], row["seconds"]) for row in found] == [
        ("dropped", 0.0),
        ("dropped", 0.3),
        ("main", 0.0),
        ("main", 0.3),
    ]
    for before, after in (found[:2], found[2:]):
        assert before["kl"] > 0
        assert after["left"] == after["kl"] / before["kl"]
        assert after["is_kept"] or after["kl"] == before["kl"]
        assert after["n_bytes"] == before["n_bytes"]
