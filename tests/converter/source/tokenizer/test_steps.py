"""Steps of a tokenizer.json or tokenizer.model: a GGUF file holds them with the library's ids, or they are refused."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from slimoe.converter.source.tokenizer import check as tokenizer_check
from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.converter.source.tokenizer.space_prefix import notes
from slimoe.converter.source.tokenizer.vocabulary import tokenizer_metadata
from slimoe.offload.errors import UnsupportedModelError
from tests.models.tokenizer_files import GPT_4, as_json, byte_level, llama_2, read_files, split_by, write_files

SETTINGS = {"bos_token": "<s>", "eos_token": "</s>"}


def changed(file: dict[str, Any], part: str, value: Any) -> dict[str, Any]:
    """The file with another part, `model.x` for a field of the model."""
    if part.startswith("model."):
        return file | {"model": file["model"] | {part.removeprefix("model."): value}}
    return file | {part: value}


def metaspace(**values: Any) -> Any:
    return as_json(pre_tokenizers.Metaspace(**values))


def added(**flags: Any) -> list[dict[str, Any]]:
    token = {"id": 1, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False}
    return [token | {"normalized": False, "special": True} | flags]


def template(single: str, *tokens: tuple[str, int]) -> Any:
    return as_json(processors.TemplateProcessing(single=single, special_tokens=list(tokens)))


ESCAPE = normalizers.Replace(" ", "▁")
LIKE_SENTENCEPIECE = {
    "NFKC": ("normalizer", as_json(normalizers.NFKC())),
    "NFC": ("normalizer", as_json(normalizers.NFC())),
    "NFD": ("normalizer", as_json(normalizers.Sequence([normalizers.NFD(), ESCAPE]))),
    "NFKD": ("normalizer", as_json(normalizers.Sequence([ESCAPE, normalizers.NFKD()]))),
    "Lowercase": ("normalizer", as_json(normalizers.Lowercase())),
    "StripAccents": ("normalizer", as_json(normalizers.StripAccents())),
    "Strip": ("normalizer", as_json(normalizers.Strip())),
    "Nmt": ("normalizer", as_json(normalizers.Nmt())),
    "Precompiled": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "Replace": ("normalizer", as_json(normalizers.Replace("a", "b"))),
    "normaliser Replace": ("normalizer", as_json(normalizers.Sequence([ESCAPE, ESCAPE]))),
    "Prepend": ("normalizer", as_json(normalizers.Prepend("_"))),
    "Metaspace with split": ("pre_tokenizer", metaspace(prepend_scheme="first", split=True)),
    "pre-tokenizer Metaspace with split": ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁"}),
    "Metaspace": ("pre_tokenizer", metaspace(replacement="_", split=False)),
    "WhitespaceSplit": ("pre_tokenizer", as_json(pre_tokenizers.WhitespaceSplit())),
    "Digits": (
        "pre_tokenizer",
        as_json(pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace(split=False)])),
    ),
    "pre-tokenizer Split": (
        "pre_tokenizer",
        as_json(pre_tokenizers.Sequence([pre_tokenizers.Metaspace(split=False), split_by("<code>")])),
    ),
    "neither byte-level": ("pre_tokenizer", None),
    "dropout": ("model.dropout", 0.1),
    "ignore_merges": ("model.ignore_merges", True),
    "byte_fallback": ("model.byte_fallback", False),
    "continuing_subword_prefix": ("model.continuing_subword_prefix", "##"),
    "end_of_word_suffix": ("model.end_of_word_suffix", "</w>"),
    "BertProcessing": ("post_processor", as_json(processors.BertProcessing(("</s>", 2), ("<s>", 1)))),
    "RobertaProcessing": ("post_processor", as_json(processors.RobertaProcessing(("</s>", 2), ("<s>", 1)))),
    "<s>, <s>": ("post_processor", template("<s> <s> $A", ("<s>", 1))),
    "TemplateProcessing with </s>": ("post_processor", template("</s> $A", ("</s>", 2))),
    "TemplateProcessing": ("post_processor", template("$A $A")),
    "WordPiece": ("decoder", as_json(decoders.WordPiece())),
    "CTC": ("decoder", as_json(decoders.CTC())),
    "BPEDecoder": ("decoder", as_json(decoders.BPEDecoder())),
    "decoder Replace": ("decoder", as_json(decoders.Replace("a", "b"))),
    "lstrip": ("added_tokens", added(lstrip=True)),
    "rstrip": ("added_tokens", added(rstrip=True)),
    "single_word": ("added_tokens", added(single_word=True)),
}


@pytest.mark.parametrize("name", LIKE_SENTENCEPIECE)
def test_steps_of_a_sentencepiece_like_tokenizer_are_refused(
    tmp_path: Path, sentencepiece_path: Path, name: str
) -> None:
    file = as_json(llama_2(sentencepiece_path, legacy=False))
    files = {"tokenizer.json": changed(file, *LIKE_SENTENCEPIECE[name]), "tokenizer_config.json": SETTINGS}
    with pytest.raises(UnsupportedModelError, match=name):
        tokenizer_metadata(write_files(tmp_path / "c", files), 600)


def test_normalized_tokens_are_refused_where_there_is_a_normaliser(tmp_path: Path, sentencepiece_path: Path) -> None:
    file = as_json(llama_2(sentencepiece_path, legacy=True)) | {"added_tokens": added(normalized=True)}
    with pytest.raises(UnsupportedModelError, match="'<s>' with normalized"):
        tokenizer_metadata(write_files(tmp_path / "c", {"tokenizer.json": file}), 600)
    file = as_json(llama_2(sentencepiece_path, legacy=False)) | {"added_tokens": added(normalized=True)}
    settings = SETTINGS | {"unk_token": "<unk>"}
    tokenizer = read_files(write_files(tmp_path / "d", {"tokenizer.json": file, "tokenizer_config.json": settings}))
    assert tokenizer.special_tokens.keys() >= {"<unk>", "<s>", "</s>"}
    tokenizer.close()


BYTES = as_json(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
BYTE_LEVEL = {
    "normaliser NFKC": ("normalizer", as_json(normalizers.NFKC())),
    "Lowercase": ("normalizer", as_json(normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]))),
    "add_prefix_space": ("pre_tokenizer", as_json(pre_tokenizers.ByteLevel(add_prefix_space=True))),
    "use_regex false": ("pre_tokenizer", BYTES),
    "use_regex true": ("pre_tokenizer", [as_json(split_by(GPT_4)), BYTES | {"use_regex": True}]),
    "pattern that llama.cpp does not follow": ("pre_tokenizer", [as_json(split_by(r"\w+")), BYTES]),
    "does not follow: .*Lu": ("pre_tokenizer", [as_json(split_by(r"\p{Lu}*\p{Ll}+|\p{N}")), BYTES]),
    "Split .Removed": ("pre_tokenizer", [as_json(split_by(GPT_4, "removed")), BYTES]),
    "Split .Isolated": ("pre_tokenizer", [as_json(split_by(GPT_4, invert=True)), BYTES]),
    "Digits": ("pre_tokenizer", [as_json(pre_tokenizers.Digits()), BYTES]),
    "does not follow: .*, then": ("pre_tokenizer", [as_json(split_by(GPT_4)), as_json(split_by(GPT_4)), BYTES]),
    "ignore_merges true": ("model.ignore_merges", True),
    "dropout": ("model.dropout", 0.5),
    "decoder WordPiece": ("decoder", as_json(decoders.WordPiece())),
}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_steps_of_a_byte_level_tokenizer_are_refused(tmp_path: Path, name: str) -> None:
    part, value = BYTE_LEVEL[name]
    steps = {"type": "Sequence", "pretokenizers": value} if isinstance(value, list) else value
    file = changed(as_json(byte_level()), part, steps)
    with pytest.raises(UnsupportedModelError, match=name):
        tokenizer_metadata(write_files(tmp_path / "c", {"tokenizer.json": file}), 600)


def test_a_byte_without_a_token_is_refused_where_something_stands_for_it(tmp_path: Path) -> None:
    file = as_json(byte_level())
    lost = "Ċ"
    model = file["model"] | {"unk_token": "!"}
    model["merges"] = [pair for pair in model["merges"] if lost not in "".join(pair)]
    model["vocab"] = {text: n for text, n in model["vocab"].items() if lost not in text}
    path = write_files(tmp_path / "c", {"tokenizer.json": file | {"model": model}})
    with pytest.raises(UnsupportedModelError, match="unk_token for bytes that have no token"):
        tokenizer_metadata(path, 600)
    reference = byte_level().from_str((tmp_path / "c" / "tokenizer.json").read_text())
    assert reference.encode("\n").ids == [model["vocab"]["!"]]


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("pattern", [None, GPT_4])
def test_byte_level_ids_are_the_librarys(tmp_path: Path, pattern: str | None, ignore_merges: bool) -> None:
    if pattern is None and ignore_merges:
        pattern = GPT_4
    reference = byte_level(split=pattern and split_by(pattern), ignore_merges=ignore_merges)
    tokenizer = read_files(write_files(tmp_path / "c", {"tokenizer.json": as_json(reference)}))
    for text in (*HARD_TEXTS, "<|begin|> a<|eot_id|>"):
        assert tokenizer.encode(text, parse_special=True) == reference.encode(text).ids
    tokenizer.close()


GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = GPT_4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")
DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
LING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
QWEN_35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "qwen35": ([as_json(split_by(QWEN_35)), BYTES], False),
    "bailingmoe2": ([as_json(split_by(LING)), BYTES], False),
    "gpt-4o": ([as_json(split_by(GPT_4O)), BYTES], False),
    "tekken": ([as_json(split_by(TEKKEN)), BYTES], True),
    "deepseek-v3": ([*(as_json(split_by(pattern)) for pattern in DEEPSEEK_3), BYTES], False),
    "starcoder": ([as_json(pre_tokenizers.Digits(individual_digits=True)), BYTES | {"use_regex": True}], False),
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits_of_many_steps_and_of_newer_models(tmp_path: Path, name: str) -> None:
    """The merges are of text that was not split, so that each place shows at which it is."""
    steps, ignore_merges = SPLITS[name]
    file = as_json(byte_level(split=split_by("no such text"), ignore_merges=ignore_merges))
    file = changed(file, "pre_tokenizer", {"type": "Sequence", "pretokenizers": steps})
    path = write_files(tmp_path / "c", {"tokenizer.json": file})
    metadata = tokenizer_metadata(path, 600)
    assert metadata["tokenizer.ggml.pre"] == name
    tokenizer, reference = read_files(path), byte_level().from_str((path / "tokenizer.json").read_text())
    is_rough = name in ("gpt-4o", "tekken")
    assert bool(notes(metadata)) == is_rough
    for text in HARD_TEXTS:
        if text.isascii() or not is_rough:
            assert tokenizer.encode(text, parse_special=True) == reference.encode(text).ids
    tokenizer.close()


def test_merges_of_another_kind_are_refused(tmp_path: Path, sentencepiece_path: Path) -> None:
    """sentencepiece, and so llama.cpp, merges whatever makes a token; the library only what is in its list."""
    file = as_json(llama_2(sentencepiece_path, legacy=False))
    merges = file["model"]["merges"]
    lone = next(n for n, merge in enumerate(merges) if len("".join(merge)) == 2)
    fewer = changed(file, "model.merges", merges[:lone] + merges[lone + 1 :])
    with pytest.raises(UnsupportedModelError, match="merges are not sentencepiece's"):
        tokenizer_metadata(write_files(tmp_path / "c", {"tokenizer.json": fewer}), 600)
    first = "".join(merges[0])
    several = next(n for n, m in enumerate(merges) if n and "".join(m) == "".join(merges[n - 1]) != first)
    moved = [merges[several], *merges[:several], *merges[several + 1 :]]
    with pytest.raises(UnsupportedModelError, match="do not follow each other"):
        tokenizer_metadata(write_files(tmp_path / "d", {"tokenizer.json": changed(file, "model.merges", moved)}), 600)
    both = {"tokenizer.json": fewer, "tokenizer.model": sentencepiece_path.read_bytes()}
    tokenizer = read_files(write_files(tmp_path / "e", both))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    assert tokenizer.encode("the quick brown fox") == processor.encode("the quick brown fox")
    tokenizer.close()


def test_words_may_be_split_where_no_token_goes_on_behind_a_space(tmp_path: Path, sentencepiece_path: Path) -> None:
    file = as_json(llama_2(sentencepiece_path, legacy=False))
    model = file["model"]
    inner = {text for text in model["vocab"] if "▁" in text[1:]}
    vocabulary = {text: n for text, n in model["vocab"].items() if text not in inner}
    merges = [pair for pair in model["merges"] if not inner & {*pair, "".join(pair)}]
    file |= {"model": model | {"vocab": vocabulary, "merges": merges}}
    file |= {"pre_tokenizer": metaspace(prepend_scheme="always", split=True)}
    tokenizer = read_files(write_files(tmp_path / "c", {"tokenizer.json": file}))
    reference = llama_2(sentencepiece_path, legacy=False).from_str((tmp_path / "c" / "tokenizer.json").read_text())
    for text in HARD_TEXTS:
        assert tokenizer.encode(text, parse_special=True) == reference.encode(text, add_special_tokens=False).ids
    tokenizer.close()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"model_type": "unigram"}, "unigram"),
        ({"model_type": "char"}, "char"),
        ({"model_type": "word"}, "word"),
        ({"normalization_rule_name": "nmt_nfkc"}, "nmt_nfkc"),
        ({"normalization_rule_name": "nfkc_cf"}, "nfkc_cf"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces true"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix true"),
        ({"byte_fallback": False}, "byte_fallback false"),
        ({"user_defined_symbols": ["<code>", "foo"]}, "user_defined_symbols"),
    ],
)
def test_settings_of_a_sentencepiece_model_are_refused(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        tokenizer_metadata(write_files(tmp_path / "c", {"tokenizer.model": trained(settings)}), 600)


@pytest.mark.parametrize(
    "settings",
    [
        {"add_dummy_prefix": False},
        {"split_digits": True},
        {"split_by_number": False},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<code>", "quick"]},
    ],
)
def test_settings_of_a_sentencepiece_model_that_are_held(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = trained(settings)
    tokenizer = read_files(write_files(tmp_path / "c", {"tokenizer.model": model}))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in HARD_TEXTS:
        assert tokenizer.encode(text) == processor.encode(text)
    tokenizer.close()


def trained(settings: dict[str, Any]) -> bytes:
    model = io.BytesIO()
    texts = [f"{word} {n} hello  world, the quick brown fox" for n in range(100) for word in HARD_TEXTS[2:10]]
    values: dict[str, Any] = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    values |= {"remove_extra_whitespaces": False, "vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2}
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(texts), model_writer=model, **values | settings)
    return model.getvalue()


def test_a_difference_is_told_with_the_text_and_both_ids(
    tmp_path: Path, sentencepiece_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are encoded both ways even where every step is known."""
    legacy, new = (as_json(llama_2(sentencepiece_path, legacy=legacy)) for legacy in (True, False))
    path = write_files(tmp_path / "c", {"tokenizer.json": new})
    metadata = tokenizer_metadata(path, 600)
    reference = llama_2(sentencepiece_path, legacy=True)
    (path / "tokenizer.json").write_text(reference.to_str())
    assert legacy != new
    text = next(text for text in HARD_TEXTS if text.startswith(" "))
    theirs = reference.encode(text, add_special_tokens=False).ids
    with pytest.raises(UnsupportedModelError) as caught:
        tokenizer_check.check_json(path / "tokenizer.json", metadata, None)
    assert f"{text!r} is {theirs}, but would be [" in str(caught.value)
    broken = write_files(tmp_path / "d", {"tokenizer.model": trained({"split_digits": True})})
    (path / "tokenizer.model").write_bytes(trained({"vocab_size": 390}))
    with pytest.raises(UnsupportedModelError, match="but would be"):
        tokenizer_check.check_model(path / "tokenizer.model", tokenizer_metadata(broken, 600))


@pytest.mark.parametrize(
    ("steps", "settings", "adds_bos"),
    [
        (template("<s> $A", ("<s>", 1)), {}, True),
        (template("<s> $A", ("<s>", 1)), {"add_bos_token": False}, True),
        (None, {"add_bos_token": True}, False),
        (template("$A </s>", ("</s>", 2)), {"add_bos_token": True}, False),
    ],
)
def test_what_stands_around_a_text_is_tokenizer_jsons_to_say(
    tmp_path: Path, sentencepiece_path: Path, steps: Any, settings: dict[str, Any], adds_bos: bool
) -> None:
    """transformers forgets add_bos_token where there is a tokenizer.json."""
    file = as_json(llama_2(sentencepiece_path, legacy=False)) | {"post_processor": steps}
    path = write_files(tmp_path / "c", {"tokenizer.json": file, "tokenizer_config.json": SETTINGS | settings})
    tokenizer = read_files(path)
    reference: Any = PreTrainedTokenizerFast.from_pretrained(path)
    assert tokenizer.add_bos is adds_bos is (reference("a")["input_ids"][0] == 1)
    tokenizer.close()


def test_truncation_and_padding_are_not_of_the_text(tmp_path: Path) -> None:
    """They are settings of whoever trained the model last, and transformers leaves them off too."""
    file = as_json(byte_level())
    file["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    file["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    path = write_files(tmp_path / "c", {"tokenizer.json": file})
    tokenizer = read_files(path)
    reference: Any = PreTrainedTokenizerFast.from_pretrained(path)
    for text in HARD_TEXTS:
        assert tokenizer.encode(text, parse_special=True) == reference(text)["input_ids"]
    assert tokenizer.special_tokens["!"] == 0
    tokenizer.close()
