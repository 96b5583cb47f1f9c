"""Reports on compressed files: their figures, their words, their pictures, and what the file keeps of them."""

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import yaml
from gguf import GGMLQuantizationType as Type
from PIL import Image

from slimoe.converter.forward.texts import TextFile, default_texts, documents, held_out_texts
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.report.alignment import planned_layer_map
from slimoe.converter.report.block_facts import BlockFacts, RowFacts, block_facts
from slimoe.converter.report.eval_text import EvalText, eval_windows, read_eval_text, seen_share
from slimoe.converter.report.evaluation import evaluate
from slimoe.converter.report.make import known_report, report_paths, save_report, write_report
from slimoe.converter.report.markdown import markdown
from slimoe.converter.report.measure import ReportMaker, ReportSettings
from slimoe.converter.report.plots import type_map, use_map
from slimoe.converter.report.report import Report
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.writer import write_planned
from slimoe.offload.errors import UsageError
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.native_format import read_layout
from slimoe.offload.model.spec import ModelSpec
from slimoe.server.chat.text_encoder import TokenizerEncoder
from tests.models.compress_plans import same_plan, with_layers
from tests.models.gguf_content import GGUFContent, quantise, read_content, write_content
from tests.models.tiny_gguf import FineShape, write_family

SETTINGS = ReportSettings(n_block_tokens=64, n_written=20)
LENGTH = 48


def evaluation_text(source: ModelSource) -> EvalText:
    rng = np.random.default_rng(5)
    texts = {name: rng.integers(3, 500, n).tolist() for name, n in (("tales", 3 * LENGTH), ("code", 2 * LENGTH))}
    return EvalText(eval_windows(texts, LENGTH), True, 0.25)


def small_plan(source: ModelSource) -> CompressPlan:
    """Types alike but in one expert, two experts gone and one a constant; second copies of the first layer."""
    plan = same_plan(source, "Q8_0", "native")
    first, second = plan.layers[:2]
    low = replace(first.experts[0], types=(Type.F16,) * 3, low_types=(Type.Q4_0,) * 3)
    changes: dict[str, Any] = {"experts": second.experts[:3], "rows": (0, 2, 3, 5), "target": (0, 1, 2, -1)}
    changes["constants"] = np.zeros((1, source.spec.n_embd), np.float32)
    layers = {0: replace(first, experts=(low, *first.experts[1:])), 1: replace(second, **changes)}
    return replace(with_layers(plan, layers), expected_kl=0.0625)


@pytest.fixture(scope="module")
def made(
    source: ModelSource, statistics: Statistics, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CompressPlan, Report]:
    """A file with its report beside it."""
    target, plan = tmp_path_factory.mktemp("report") / "tiny [q].gguf", small_plan(source)
    write_planned(source, plan, target, statistics)
    maker = ReportMaker(
        source,
        target,
        evaluation_text(source),
        statistics=statistics,
        plan=plan,
        settings=SETTINGS,
        expected_lacks=["merged experts"],
    )
    assert sum(maker.seconds.values()) > 0
    return target, plan, write_report(maker)


def fields(target: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report_paths(target)["json"].read_text())
    return found


def test_figures_are_those_of_the_evaluation(made: tuple[Path, CompressPlan, Report], source: ModelSource) -> None:
    target, plan, _ = made
    windows = evaluation_text(source).windows
    texts: dict[str, list[int]] = {}
    for domain, tokens in zip(windows.domains, windows.sequences.tokens, strict=True):
        texts.setdefault(domain, []).extend(tokens)
    quality = evaluate(open_source(target), source, texts, layer_map=planned_layer_map(plan), length=LENGTH)
    found = fields(target)
    assert found["quality"]["total"]["divergence"]["mean"] == quality.total.divergence.mean > 0
    assert {n: one["perplexity"] for n, one in found["quality"]["domains"].items()} == {
        n: one.perplexity for n, one in quality.domains.items()
    }
    assert found["quality"]["flips"] == list(quality.flips)
    assert found["expected_kl"] == 0.0625
    assert len(found["block_kl"]) == 2
    assert all(value > 0 for value in found["block_kl"])
    assert found["evaluated_on"]["seen"] == 0.25


def test_bytes_and_types_are_those_of_the_file(made: tuple[Path, CompressPlan, Report]) -> None:
    target, _, report = made
    found, gguf = fields(target), read_gguf(target)
    assert found["file"]["n_bytes"] == target.stat().st_size
    n_data = sum(tensor.n_bytes for tensor in gguf.tensors.values())
    assert sum(part["n_bytes"] for part in found["file"]["parts"]) == n_data
    in_layers = sum(tensor.n_bytes for name, tensor in gguf.tensors.items() if name.startswith("blk."))
    assert sum(sum(facts.n_bytes.values()) for facts in report.blocks) == in_layers
    assert report.blocks[0].n_bytes["second copies"] == 3 * 64 * 96 * 18 // 32
    first, second = (facts.rows for facts in report.blocks)
    q8 = ("Q8_0",) * 3
    assert first[0] == RowFacts(0, False, ("F16",) * 3, ("Q4_0",) * 3, 96)
    assert list(first[1:]) == [RowFacts(n, False, q8, (), 96) for n in range(1, 6)]
    assert [row.stored for row in second] == [0, None, 1, 2, None, None]
    assert [row.is_constant for row in second] == [False] * 5 + [True]
    assert [row.bits for row in second] == [8.5, None, 8.5, 8.5, None, None]


def test_the_file_knows_its_quality(made: tuple[Path, CompressPlan, Report], source: ModelSource) -> None:
    target, _, report = made
    gguf = read_gguf(target)
    told = json.loads(str(gguf.metadata[keys.QUALITY]))
    assert told["kl"] == pytest.approx(report.quality.total.divergence.mean, rel=1e-4)
    assert list(told["domains"]) == ["tales", "code"]
    measured = read_layout(gguf, ModelSpec.from_gguf(gguf)).measured_kl
    assert report.low_quality is not None
    both = (report.quality.total.divergence.mean, report.low_quality.divergence.mean)
    assert measured == pytest.approx(both, rel=1e-6)
    assert both[1] > both[0]


def test_words_and_pictures(made: tuple[Path, CompressPlan, Report]) -> None:
    target, _, report = made
    paths = report_paths(target)
    text = paths["markdown"].read_text()
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "Quality by domain",
        "Damage by layer",
        "Words by frequency",
        "Writing",
        "Calibration",
        "Bytes",
        "Types",
        "Recipe",
        "Provenance",
    ]
    assert "0.0625, and what merged experts cost" in text
    assert "25.0 % of the text was calibrated on, so the figures flatter" in text
    assert report.file.sha256 in text
    assert "5 x Q8_0, 1 x F16 + Q4_0" in text
    pictures = sorted(path.name for path in paths["plots"].iterdir())
    assert pictures == ["bytes-by-layer.png", "expert-use.png", "kl-by-layer.png", "type-map.png"]
    for name in pictures:
        assert f"({quote(target.name)}.report/{name})" in text
        with Image.open(paths["plots"] / name) as picture:
            assert picture.size[0] > 300
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10


def test_types_of_latent_and_of_joined_attention(made: tuple[Path, CompressPlan, Report], tmp_path: Path) -> None:
    for name in ("deepseek2", "bailingmoe2"):
        path = write_family(tmp_path / "whole.gguf", name, shape=FineShape(n_layer=2, n_expert=8, n_expert_used=2))
        content = read_content(path).quantised(Type.Q8_0, lambda role: "attn_kv_a_mqa" in role or "attn_qkv" in role)
        path = write_content(tmp_path / f"{name}.gguf", content)
        text = markdown(replace(made[2], blocks=block_facts(path, gguf_source(path), None)), {})
        row = next(line for line in text.split("## Types")[1].splitlines() if line.startswith("| 1 "))
        assert sorted(row.split("|")[2].split()) == ["F32", "Q8_0"]


def test_the_card_is_for_hubs(made: tuple[Path, CompressPlan, Report]) -> None:
    target, _, report = made
    card = report_paths(target)["card"].read_text()
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["base_model"] == "tiny-moe"
    assert "license" not in values
    assert "llama.cpp" not in values["tags"]
    assert "whose files do not say" in body
    assert "slimoe serve" in body
    assert "llama-cli" not in body
    other = replace(report, provenance=replace(report.provenance, licence="apache-2.0"))
    other = replace(other, file=replace(report.file, format="stock", loads_in=("llama.cpp", "slimoe")))
    save_report(other, target)
    card = report_paths(target)["card"].read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    assert "llama-cli -m" in card
    save_report(report, target)


def test_renamed_fields_have_their_old_names_too(made: tuple[Path, CompressPlan, Report]) -> None:
    found = fields(made[0])
    assert found["judged"] == found["evaluated_on"]
    assert found["probes"] == found["cloze"]
    assert found["coverage"]["picks"] == found["coverage"]["selections"]
    rows = [row for block in found["blocks"] for row in block["rows"]]
    assert [row["is_novice"] for row in rows] == [row["is_constant"] for row in rows]
    assert any(row["is_novice"] for row in rows)
    words = found["cloze"].values()
    assert [one["lost_nats"] for one in words] == [one["log_probability_loss"] for one in words]


def test_reports_of_the_version_before_are_read(made: tuple[Path, CompressPlan, Report], tmp_path: Path) -> None:
    target, _, report = made
    found, path = fields(target), tmp_path / "old.json"
    del found["evaluated_on"], found["cloze"], found["coverage"]["selections"]
    for row in [row for block in found["blocks"] for row in block["rows"]]:
        del row["is_constant"]
    for one in found["probes"].values():
        del one["log_probability_loss"]
    path.write_text(json.dumps(found))
    origin = report.provenance.source_hash, report.file.sha256
    assert known_report(path, *origin) == known_report(report_paths(target)["json"], *origin) == report
    assert known_report(path, origin[0], "of another file") is None
    del found["judged"]
    for broken in (json.dumps(found), json.dumps({**found, "blocks": 3}), "[]", "{}"):
        path.write_text(broken)
        assert known_report(path, *origin) is None


def test_a_file_like_its_source_lost_nothing(source: ModelSource, tmp_path: Path) -> None:
    target = tmp_path / "same.gguf"
    write_planned(source, same_plan(source, "F32"), target)
    before = target.read_bytes()
    report = write_report(ReportMaker(source, target, evaluation_text(source), settings=SETTINGS), record=False)
    assert report.quality.total.divergence.largest == pytest.approx(0, abs=1e-6)
    assert report.quality.flips == (0, 0)
    assert report.quality.total.same_top == 1
    assert report.block_kl == pytest.approx((0, 0), abs=1e-6)
    assert report.writing == report.source_writing
    assert report.coverage is None
    assert report.file.share > 2
    assert target.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "same.gguf",
        *(path.name for path in report_paths(target).values()),
    }


def test_experts_that_nobody_met_are_named(
    made: tuple[Path, CompressPlan, Report], statistics: Statistics, source: ModelSource
) -> None:
    layer = statistics.layers[1]
    assert layer.outputs is not None
    counts = layer.outputs.n_pick.copy()
    counts[4] = 0
    blind = replace(layer, outputs=replace(layer.outputs, n_pick=counts))
    seen = replace(statistics, layers=(statistics.layers[0], blind))
    settings = ReportSettings(n_block_tokens=0, n_written=0)
    report = ReportMaker(source, made[0], evaluation_text(source), statistics=seen, settings=settings).make()
    assert report.coverage is not None
    assert (1, 4) in report.coverage.unseen
    assert report.coverage.n_seen == report.coverage.n_experts - len(report.coverage.unseen)
    assert report.block_kl is None
    assert report.writing is None


def test_maps_of_many_experts(made: tuple[Path, CompressPlan, Report], tmp_path: Path) -> None:
    """48 layers of 128 experts still make a picture of sane size, as do 32 of 8."""
    _, _, report = made
    assert report.coverage is not None
    for n_layer, n_expert in ((48, 128), (32, 8)):
        blocks = tuple(
            replace(report.blocks[0], block=n, rows=(report.blocks[0].rows[0], RowFacts()) * (n_expert // 2))
            for n in range(n_layer)
        )
        selections = (tuple(range(n_expert)),) * n_layer
        large = replace(report, blocks=blocks, coverage=replace(report.coverage, selections=selections))
        for draw in (type_map, use_map):
            figure = draw(large)
            assert figure is not None
            figure.savefig(tmp_path / "map.png", dpi=60)
            with Image.open(tmp_path / "map.png") as picture:
                assert all(60 * 4 < side <= 60 * 16 for side in picture.size)


# --- the texts to evaluate on -----------------------------------------------------------------------------------


class Words:
    """Every character is a token."""

    def text(self, text: str, *, at_start: bool) -> list[int]:
        return list(map(ord, text))

    def chat(self, messages: Any) -> list[int]:
        return self.text(messages[0]["content"], at_start=True)


def test_no_text_of_the_mixture_is_for_both_calibration_and_evaluation() -> None:
    for kept, held in zip(default_texts(), held_out_texts(), strict=True):
        assert kept.domain == held.domain
        known, eval_ids = ([*chain(*documents(file, Words(), 1 << 20))] for file in (kept, held))
        assert known + eval_ids == [*chain(*documents(TextFile("all", kept.path), Words(), 1 << 20))]
        assert len(eval_ids) > 100


def test_our_mixture_is_text_enough() -> None:
    """Tokens of large vocabularies have four characters of such a mixture, at most: these are 40,000 of them."""
    n_characters = sum(len(ids) for file in default_texts() for ids in documents(file, Words(), 1 << 20))
    assert n_characters >= 4 * 40_000
    licence = (default_texts()[0].path.parent / "LICENSE.md").read_text("utf-8")
    assert [file.path.name for file in default_texts() if f"`{file.path.name}`" not in licence] == []


def test_texts_that_were_calibrated_on_are_found(statistics: Statistics, source: ModelSource) -> None:
    strange = list(range(100, 148))
    windows = eval_windows({"seen": list(statistics.tokens[0]), "new": strange}, LENGTH)
    assert seen_share(windows, statistics) == 0.5
    encoder = TokenizerEncoder(source.path, source.metadata)
    text = read_eval_text((), encoder, source.spec.n_ctx_train, statistics, n_tokens=2000)
    assert text.is_own
    assert text.seen == 0
    assert set(text.windows.domains) == {file.domain for file in default_texts()}
    encoder.close()


def test_texts_of_a_persons_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 100)
    (tmp_path / "b.txt").write_text("xyz" * 10)
    files: Mapping[str, TextFile] = {name: TextFile(name, tmp_path / f"{name}.txt") for name in "ab"}
    text = read_eval_text(tuple(files.values()), Words(), 64, n_tokens=256)
    assert (text.is_own, text.seen) == (False, None)
    assert [*map(len, text.windows.sequences.tokens)] == [64, 64, 30]
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(UsageError, match="no text to evaluate on"):
        read_eval_text((files["b"],), Words(), 64)


def test_a_report_that_cannot_be_written(made: tuple[Path, CompressPlan, Report], tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    report_paths(target)["plots"].write_bytes(struct.pack("<I", 0))
    with pytest.raises(UsageError, match=r"m\.gguf\.report cannot be written"):
        save_report(made[2], target)


def test_types_of_dense_layers_and_of_shared_experts(tmp_path: Path, made: tuple[Path, CompressPlan, Report]) -> None:
    shape = FineShape(n_layer=2, n_expert=8, n_expert_used=4)
    path = write_family(tmp_path / "m.gguf", "glm4moe", Type.Q4_K, shape)
    content = read_content(path)
    down = quantise(np.ones((shape.n_embd, shape.n_ff), np.float32), Type.Q8_0)
    tensors = content.tensors | {"blk.1.ffn_down_shexp.weight": down}
    path = write_content(tmp_path / "mixed.gguf", GGUFContent(content.keys, tensors))
    first, second = block_facts(path, gguf_source(path), None)
    assert first.dense == dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "Q4_K")
    assert second.dense == {"ffn_gate_shexp": "Q4_K", "ffn_up_shexp": "Q4_K", "ffn_down_shexp": "Q8_0"}
    _, _, report = made

    def types(blocks: tuple[BlockFacts, ...]) -> list[list[str]]:
        section = markdown(replace(report, blocks=blocks), {}).partition("## Types")[2].partition("## Recipe")[0]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.strip().splitlines()]

    head, _, *rows = types((first, second, replace(second, layer=None)))
    assert head[:4] == ["Block", "Attention", "Dense, shared experts", "Experts: gate/up/down"]
    assert [row[2] for row in rows] == ["Q4_K", "Q4_K Q8_0", "dropped"]
    assert len({len(row) for row in (head, *rows)}) == 1
    assert types(report.blocks)[0][:3] == ["Block", "Attention", "Experts: gate/up/down"]
