"""`slimoe calibrate` and its texts: from files to sequences, to a file of statistics, and mistakes in one line."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from numpy.typing import NDArray
from transformers.utils.chat_template_utils import render_jinja_template

import slimoe.converter.stats.calibrate as front
from slimoe.converter.forward.texts import MIN_TOKENS, CalibrationText, TextFile, default_texts, read_texts
from slimoe.converter.source.held_source import HeldSource
from slimoe.converter.source.model_source import MatrixKey, ModelSource, expert_key
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.estimate import estimate
from slimoe.converter.stats.forward_pass import CalibrationSettings
from slimoe.converter.stats.observer import Samples
from slimoe.converter.stats.statistics_file import load_statistics
from slimoe.offload.errors import ModelFileError, UsageError
from slimoe.offload.files.whole_file import Destination
from slimoe.server.chat.text_encoder import TokenizerEncoder
from slimoe.server.cli import run
from tests.models.tiny_gguf import MIXTRAL_TEMPLATE


class Letters:
    """One token for each character."""

    def text(self, text: str, *, at_start: bool) -> list[int]:
        return [1] * at_start + [ord(character) for character in text]

    def chat(self, messages: Sequence[Any]) -> list[int]:
        return [2, *(ord(character) for message in messages for character in message["content"])]


def write(path: Path, text: str) -> TextFile:
    path.write_text(text, "utf-8")
    return TextFile.parse(str(path))


def test_texts_are_cut_and_taken_in_turns(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.txt", "a" * 5000), write(tmp_path / "two.txt", "b" * 1000)
    text = read_texts((one, two), Letters(), 4000, 100)
    assert text.n_tokens == 4000
    assert text.domains[:4] == ("one", "two", "one", "two")
    assert {len(tokens) for tokens in text.tokens} == {100}
    assert text.domains.count("two") == 10, "its last token is too little for a sequence"
    begins = [tokens for tokens in text.tokens if tokens[0] == 1]
    assert len(begins) == 2, "only what begins a text is marked so"


def test_sequences_come_from_all_over_a_text(tmp_path: Path) -> None:
    lines = "".join(f"{n:04}\n" for n in range(10000))
    text = read_texts((write(tmp_path / "long.txt", lines),), Letters(), MIN_TOKENS, 64)
    numbers = [int(found) for tokens in text.tokens for found in re.findall(r"\d{4}", "".join(map(chr, tokens)))]
    for tenth in range(10):
        assert any(tenth * 1000 <= number < (tenth + 1) * 1000 for number in numbers)
    longer = read_texts((write(tmp_path / "longer.txt", lines * 5),), Letters(), MIN_TOKENS, 64)
    assert longer.n_tokens == MIN_TOKENS


def test_files_have_names_and_forms(tmp_path: Path) -> None:
    chats = "\n".join(json.dumps({"messages": [{"role": "user", "content": "x" * 600}]}) for _ in range(4))
    plain = json.dumps({"text": "y" * 40})
    (tmp_path / "c.jsonl").write_text(f"{chats}\n\n{plain}\n")
    file = TextFile.parse(f"talk={tmp_path / 'c.jsonl'}")
    assert file == TextFile("talk", tmp_path / "c.jsonl")
    text = read_texts((file,), Letters(), 10000, 512)
    assert set(text.domains) == {"talk"}
    assert sorted(len(tokens) for tokens in text.tokens) == [41, 89, 89, 89, 89, 512, 512, 512, 512]
    named = write(tmp_path / "odd=name.txt", "z")
    assert named.domain == "odd=name"


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"messages": 5}', '{"messages": [{"role": "user"}]}', '{"a": 1}'])
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UsageError, match=r"c\.jsonl: line 2 is no text or conversation"):
        read_texts((TextFile("c", tmp_path / "c.jsonl"),), Letters(), 10000, 512)


def test_too_little_text_says_how_much_is_missing(tmp_path: Path) -> None:
    file = write(tmp_path / "short.txt", "a" * 1999)
    with pytest.raises(UsageError, match=r"2,000 tokens, 48 less .* --text"):
        read_texts((file,), Letters(), 10000, 512)
    with pytest.raises(UsageError, match=r"1,000 tokens, 1,048 less .* --tokens"):
        read_texts((file,), Letters(), 1000, 512)
    (tmp_path / "image.txt").write_bytes(b"\xff\xfe\x00")
    for name, words in (("image.txt", "not UTF-8"), ("absent.txt", "cannot be read")):
        with pytest.raises(ModelFileError, match=words):
            read_texts((TextFile("x", tmp_path / name),), Letters(), 10000, 512)


def test_the_mixture_is_large_enough_and_clean() -> None:
    files = default_texts()
    assert len(files) >= 5
    assert sum(file.path.stat().st_size for file in files) > 60_000
    assert read_texts(files, Letters(), 10**6, 512).n_tokens > 60_000
    assert (files[0].path.parent / "LICENSE.md").read_text().count("`") >= 2 * len(files)


def test_tokens_are_those_of_the_model(moe_checkpoint: Path) -> None:
    source = open_source(moe_checkpoint)
    encoder = TokenizerEncoder(source.path, source.metadata)
    pieces = sentencepiece.SentencePieceProcessor(str(moe_checkpoint / "tokenizer.model"))
    text = "the quick brown fox\n\n  naïve 日本語 </s>"
    plain = pieces.encode(text)
    assert encoder.text(text, at_start=True) == [1, *plain]
    assert encoder.text(text, at_start=False) == plain
    messages = [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": "hello world"}]
    rendered = render_jinja_template([messages], chat_template=MIXTRAL_TEMPLATE, bos_token="<s>", eos_token="</s>")[0][
        0
    ]
    ids = encoder.chat(messages)
    assert (ids[0], ids[-1], ids.count(1), ids.count(2)) == (1, 2, 1, 1)
    assert pieces.decode(ids).split() == rendered.replace("<s>", " ").replace("</s>", " ").split()
    encoder.close()


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("the quick brown fox jumps over a lazy dog " * 400)
    return path


def arguments(checkpoint: Path, target: Path, prose: Path) -> list[str]:
    short = ["--tokens", "2048", "--length", "64", "--device", "cpu", "--types", "q8_0"]
    return ["calibrate", str(checkpoint), "-o", str(target), "--text", f"words={prose}", *short, "--json"]


def test_from_a_checkpoint_to_a_file(
    moe_checkpoint: Path, tmp_path: Path, prose: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a.stats"
    assert run(arguments(moe_checkpoint, target, prose)) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["n_tokens"] == 2048
    assert report["domains"] == {"words": 2048}
    assert report["n_experts"] == 12
    assert report["n_bytes"] == target.stat().st_size
    assert report["peak_bytes"] > 10**7
    assert [set(layer) for layer in report["layers"]] == [
        {"busiest_share", "n_unseen", "block_cosine", "ffn_cosine"}
    ] * 2
    assert all(1 / 6 <= layer["busiest_share"] <= 1 / 3 for layer in report["layers"])
    assert "2,048 tokens in 32 sequences on cpu, about" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.stats"]
    statistics = load_statistics(target, open_source(moe_checkpoint))
    assert statistics.layers[1].sensitivity is not None
    assert statistics.layers[1].type_errors is not None
    assert statistics.layers[1].type_errors.types == ("Q8_0",)
    assert run(arguments(moe_checkpoint, target, prose)) == 2
    assert "--force" in capsys.readouterr().err


def test_an_interruption_keeps_what_is_done(
    moe_checkpoint: Path,
    tmp_path: Path,
    prose: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "a.stats"
    carry_out = front.carry_out

    def interrupted(planned: front.CalibratePlan, path: Destination, on_progress: Any) -> front.CalibrateReport:
        def stop(what: str, done: int, total: int) -> None:
            if done == 1:
                raise KeyboardInterrupt

        return carry_out(planned, path, stop)

    monkeypatch.setattr(front, "carry_out", interrupted)
    assert run(arguments(moe_checkpoint, target, prose)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.stats.partial"]
    monkeypatch.setattr(front, "carry_out", carry_out)
    assert run(arguments(moe_checkpoint, target, prose)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.stats"]


def test_a_model_without_experts(dense_checkpoint: Path, tmp_path: Path, prose: Path) -> None:
    """It has no experts to compress, but an importance matrix can be made of its statistics."""
    target = tmp_path / "a.stats"
    assert run(arguments(dense_checkpoint, target, prose)) == 0
    statistics = load_statistics(target, open_source(dense_checkpoint))
    assert statistics.layers[0].sensitivity is not None
    assert statistics.matrix_costs is None


@pytest.mark.parametrize("flag", ["-o", "--imatrix"])
def test_the_model_is_not_overwritten(
    moe_checkpoint: Path, tmp_path: Path, prose: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    weights = moe_checkpoint / "model.safetensors"
    before = weights.read_bytes()
    assert run([*arguments(moe_checkpoint, tmp_path / "a.stats", prose), flag, str(weights), "--force"]) == 2
    assert "is a file of the model that is read" in capsys.readouterr().err
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (["--types", "Q9_Z"], 2, "no type that weights are quantised to"),
        (["--device", "quantum"], 2, "torch has no device 'quantum'"),
        (["--tokens", "100"], 2, "1,948 less"),
        (["-o", "/nowhere/a.stats"], 2, "is no directory"),
        (["--text", "/nowhere.txt"], 3, "cannot be read"),
    ],
)
def test_mistakes_in_one_line(
    moe_checkpoint: Path,
    tmp_path: Path,
    prose: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    status: int,
    words: str,
) -> None:
    assert run([*arguments(moe_checkpoint, tmp_path / "a.stats", prose), *change]) == status
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_counts_all_kinds_of_work(moe_checkpoint: Path, k_quant_checkpoint: Path) -> None:
    text = CalibrationText(((1, 2, 3),) * 10, ("a",) * 10)
    settings = CalibrationSettings(Samples(("Q2_K",)))
    expected = estimate(open_source(k_quant_checkpoint), text, settings)
    assert {"read", "pass", "types", "sensitivity"} <= set(expected.seconds)
    assert min(expected.seconds.values()) > 0
    assert expected.state_bytes == 4 * 4 * 30 * 256
    few = estimate(open_source(moe_checkpoint), text, replace(settings, n_sensitivity=0))
    assert few.seconds["types"] == 0, "its rows are no blocks of that type"
    assert "sensitivity" not in few.seconds
    assert few.seconds["widths"] > 0
    narrow = estimate(open_source(moe_checkpoint), text, CalibrationSettings(Samples((), widths=False)))
    assert "widths" not in narrow.seconds
    priced = estimate(open_source(moe_checkpoint), text, CalibrationSettings(Samples(()), prices=True))
    assert "prices" in priced.seconds, "which tries all types that a plan may choose, F16 among them"


class _Watched(HeldSource):
    """Knows which experts were read."""

    def __init__(self, source: ModelSource) -> None:
        super().__init__(source)
        self.experts: set[MatrixKey] = set()

    def read(self, key: MatrixKey) -> NDArray[np.float32]:
        self.experts |= {key} if key.expert >= 0 else set()
        return super().read(key)


def test_an_estimate_reads_one_expert(moe_checkpoint: Path) -> None:
    """Of large models a layer takes a minute."""
    source = _Watched(open_source(moe_checkpoint))
    estimate(source, CalibrationText(((1, 2, 3),) * 100, ("a",) * 100), CalibrationSettings(prices=True))
    assert {str(key) for key in source.experts} == {str(expert_key(0, name, 0)) for name in ("gate", "up", "down")}


def test_without_widths_nothing_is_known_of_narrower_experts(
    moe_checkpoint: Path, tmp_path: Path, prose: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a.stats"
    assert run([*arguments(moe_checkpoint, target, prose), "--no-widths"]) == 0
    assert "narrower experts" not in capsys.readouterr().err
    statistics = load_statistics(target, open_source(moe_checkpoint))
    assert all(layer.widths is None for layer in statistics.layers)
    plan = ["plan", str(moe_checkpoint), "--stats", str(target), "--target-bpw", "9", "--json"]
    assert run(plan) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {expert["width"] for layer in layers for expert in layer["experts"]} == {None}
