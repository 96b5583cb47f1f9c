"""Tokenizers as checkpoints carry them, against the libraries that made them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf.vocab import SentencePieceVocab
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference

from converter.convert import ConvertOptions, convert
from converter.sentencepiece_model import SentencePieceModel
from converter.tokenizer_json import TokenizerJson
from offload.errors import ModelFileError, UnsupportedModelError
from offload.gguf_file import read_gguf
from offload.tokenizer import Tokenizer
from tests.conftest import train_sentencepiece
from tests.nasty_texts import NASTY_TEXTS

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_the_sentencepiece_reader_sees_what_sentencepiece_sees(tmp_path: Path, sentencepiece_path: Path) -> None:
    seen = SentencePieceModel.read(sentencepiece_path)
    expected = list(SentencePieceVocab(sentencepiece_path.parent).all_tokens())
    assert [(p.text.encode(), p.score, p.type) for p in seen.pieces] == [(t, s, int(k)) for t, s, k in expected]
    assert seen.add_dummy_prefix
    user = SentencePieceModel.read(train_sentencepiece(tmp_path / "u.model", user_symbols=("<code>",)))
    assert [p.type for p in user.pieces if p.text == "<code>"] == [4]


@pytest.mark.parametrize(("kind", "rule"), [("unigram", "identity"), ("bpe", "nmt_nfkc")])
def test_sentencepiece_models_that_a_gguf_cannot_express(tmp_path: Path, kind: str, rule: str) -> None:
    texts = iter([f"{word} {n}" for n in range(300) for word in NASTY_TEXTS[2:4]])
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


def llama_2_reference(sentencepiece_path: Path, *, legacy: bool) -> Any:
    """The tokenizer.json that transformers makes of a sentencepiece model."""
    pieces = SentencePieceModel.read(sentencepiece_path).pieces
    vocabulary = {piece.text: token for token, piece in enumerate(pieces)}
    merges = []
    for piece in sorted(pieces, key=lambda p: -p.score):
        splits = [(piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text))] if piece.type == 1 else []
        merges += [pair for pair in splits if set(pair) <= vocabulary.keys()]
    reference = Reference(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        reference.normalizer = normalizers.Sequence(steps)
    else:
        reference.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    reference.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    reference.post_processor = template
    return reference


def llama_3_reference() -> Any:
    reference = Reference(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(NASTY_TEXTS * 3, trainer)
    reference.add_special_tokens(["<|begin|>", "<|eot_id|>"])
    return reference


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
    reference = llama_2_reference(sentencepiece_path, legacy=legacy)
    tokenizer = converted(tmp_path / "c", moe_checkpoint, reference, {"bos_token": "<s>", "eos_token": "</s>"})
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    for text in NASTY_TEXTS:
        assert tokenizer.encode(text) == processor.encode(text)
    assert tokenizer.add_bos
    chat = "<s>[INST] a  b [/INST] c</s>[INST]d"
    assert tokenizer.encode(chat, parse_special=True) == reference.encode(chat, add_special_tokens=False).ids
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)


def test_llama_3s_tokenizer_json(tmp_path: Path, moe_checkpoint: Path) -> None:
    reference = llama_3_reference()
    settings = {"bos_token": "<|begin|>", "eos_token": "<|eot_id|>"}
    tokenizer = converted(tmp_path / "c", moe_checkpoint, reference, settings)
    for text in NASTY_TEXTS:
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
    with pytest.raises(ModelFileError, match="lacks parts"):
        TokenizerJson.read(path)
