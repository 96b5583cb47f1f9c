"""Tokenizers as checkpoints carry them, against the libraries that made them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf.vocab import SentencePieceVocab

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.converter.source.tokenizer.sentencepiece_model import SentencePieceModel
from slimoe.converter.source.tokenizer.tokenizer_json import TokenizerJson
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.text.tokenizer import Tokenizer
from tests.models.tiny_checkpoint import train_sentencepiece
from tests.models.tokenizer_files import GPT_4, byte_level, llama_2, split_by


def test_the_sentencepiece_reader_sees_what_sentencepiece_sees(tmp_path: Path, sentencepiece_path: Path) -> None:
    seen = SentencePieceModel.read(sentencepiece_path)
    expected = list(SentencePieceVocab(sentencepiece_path.parent).all_tokens())
    assert [(p.text.encode(), p.score, p.type) for p in seen.pieces] == [(t, s, int(k)) for t, s, k in expected]
    assert seen.add_dummy_prefix
    user = SentencePieceModel.read(train_sentencepiece(tmp_path / "u.model", user_symbols=("<code>",)))
    assert [p.type for p in user.pieces if p.text == "<code>"] == [4]


@pytest.mark.parametrize(("kind", "rule"), [("unigram", "identity"), ("bpe", "nmt_nfkc")])
def test_sentencepiece_models_that_a_gguf_cannot_express(tmp_path: Path, kind: str, rule: str) -> None:
    texts = iter([f"{word} {n}" for n in range(300) for word in HARD_TEXTS[2:4]])
    prefix = str(tmp_path / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_prefix=prefix,
        vocab_size=30,
        model_type=kind,
        normalization_rule_name=rule,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UnsupportedModelError):
        SentencePieceModel.read(tmp_path / "m.model")


def converted(source: Path, checkpoint: Path, reference: Any, settings: dict[str, Any]) -> Tokenizer:
    """The checkpoint with another tokenizer, of which only tokenizer.json is there, converted and opened."""
    shutil.copytree(checkpoint, source)
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").write_text(reference.to_str())
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    target = source.with_suffix(".gguf")
    convert(ConvertOptions(source, target, "Q8_0"))
    return Tokenizer.open(read_gguf(target))


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_2s_tokenizer_json(tmp_path: Path, moe_checkpoint: Path, sentencepiece_path: Path, legacy: bool) -> None:
    reference = llama_2(sentencepiece_path, legacy=legacy)
    tokenizer = converted(tmp_path / "c", moe_checkpoint, reference, {"bos_token": "<s>", "eos_token": "</s>"})
    for text in HARD_TEXTS:
        assert tokenizer.encode(text, parse_special=True) == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, parse_special=True, add_bos=True) == reference.encode(text).ids
    assert tokenizer.add_bos
    chat = "<s>[INST] a  b [/INST] c</s>[INST]d"
    assert tokenizer.encode(chat, parse_special=True) == reference.encode(chat, add_special_tokens=False).ids
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)


def test_llama_3s_tokenizer_json(tmp_path: Path, moe_checkpoint: Path) -> None:
    reference = byte_level(split=split_by(GPT_4), ignore_merges=True)
    settings = {"bos_token": "<|begin|>", "eos_token": "<|eot_id|>"}
    tokenizer = converted(tmp_path / "c", moe_checkpoint, reference, settings)
    for text in HARD_TEXTS:
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = reference.token_to_id
    assert (tokenizer.bos, tokenizer.eos) == (ids("<|begin|>"), ids("<|eot_id|>"))
    assert ids("<|eot_id|>") not in tokenizer.encode("<|eot_id|>")


def test_tokenizer_json_that_is_not_expressible(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        TokenizerJson.read(path)
    steps = [{"type": "Split", "pattern": {"Regex": "x"}}, {"type": "ByteLevel"}]
    model = {"type": "BPE", "vocab": {}, "merges": []}
    path.write_text(json.dumps({"model": model, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}))
    with pytest.raises(UnsupportedModelError, match="pattern"):
        TokenizerJson.read(path)
    path.write_text(json.dumps({"model": {"type": "BPE"}}))
    with pytest.raises(ModelFileError, match="missing required field"):
        TokenizerJson.read(path)
