"""Small tokenizers in the files that checkpoints carry, made by the libraries themselves."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import sentencepiece
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference
from transformers.convert_slow_tokenizer import SpmConverter
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer

from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.converter.source.tokenizer.vocabulary import tokenizer_metadata
from slimoe.offload.gguf.header import Value
from slimoe.offload.text.tokenizer import Tokenizer

GPT_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text."""


def _merges(processor: Any, pieces: list[str]) -> list[tuple[str, str]]:
    """The pairs that a sentencepiece model joins, as transformers lists them."""
    merges, known = [], set(pieces)
    for token in sorted(range(len(pieces)), key=lambda token: -processor.get_score(token)):
        is_plain = not (processor.is_control(token) or processor.is_byte(token) or processor.is_unknown(token))
        splits = [(pieces[token][:i], pieces[token][i:]) for i in range(1, len(pieces[token]))] if is_plain else []
        merges += [pair for pair in splits if set(pair) <= known]
    return merges


def gemma(sentencepiece_path: Path, *, every: int = 1) -> Any:
    """transformers' own tokenizer of Gemma with the pieces of a sentencepiece model, and of what joins them only each
    of so many, without which tokens stay that nothing makes.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    pieces = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
    vocabulary = dict(zip(pieces, range(len(pieces)), strict=True))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "mask_token": "</s>"}
    return GemmaTokenizer(vocab=vocabulary, merges=_merges(processor, pieces)[::every], **special)


def gemma_metadata(reference: Any) -> dict[str, Value]:
    """The keys that llama.cpp's converter writes for a tokenizer of `gemma`."""
    pieces = reference.convert_ids_to_tokens(range(len(reference)))
    kinds = {True: TokenType.CONTROL, False: TokenType.NORMAL}
    is_byte = [re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None for piece in pieces]
    types = [
        TokenType.BYTE if byte else kinds[piece in reference.all_special_tokens]
        for piece, byte in zip(pieces, is_byte, strict=True)
    ]
    merges = json.loads(reference.backend_tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": np.zeros(len(pieces), np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": reference.bos_token_id,
        "tokenizer.ggml.eos_token_id": reference.eos_token_id,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
    }


def llama_2(sentencepiece_path: Path, *, legacy: bool) -> Any:
    """The tokenizer.json that transformers makes of a sentencepiece model; the older form puts its space everywhere."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    pieces = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
    vocabulary, merges = dict(zip(pieces, range(len(pieces)), strict=True)), _merges(processor, pieces)
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


def byte_level(*, split: Any = None, ignore_merges: bool = False) -> Any:
    """A byte-level tokenizer that splits text by `split`, or else as GPT-2 does."""
    reference = Reference(models.BPE(ignore_merges=ignore_merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    reference.pre_tokenizer = bytes_ if split is None else pre_tokenizers.Sequence([split, bytes_])
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(HARD_TEXTS * 3, trainer)
    reference.add_special_tokens(["<|begin|>", "<|eot_id|>"])
    return reference


def split_by(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert)


def as_json(part: Any) -> Any:
    """A step as it stands in a file."""
    return json.loads(part.__getstate__())


def transformers_reading(model: Path, *, legacy: bool) -> Any:
    """What transformers makes of a lone tokenizer.model of a Mixtral, by its own code.

    It reads the file with a package that nothing else here needs, so it is given what it would have read.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    kinds = {"unknown": 2, "control": 3, "unused": 5, "byte": 6}
    pieces = []
    for token in range(processor.vocab_size()):
        kind = next((n for name, n in kinds.items() if getattr(processor, f"is_{name}")(token)), 1)
        pieces.append(SimpleNamespace(piece=processor.id_to_piece(token), score=processor.get_score(token), type=kind))
    spec = SimpleNamespace(
        precompiled_charsmap=b"", remove_extra_whitespaces=False, escape_whitespaces=True, add_dummy_prefix=True
    )
    trainer = SimpleNamespace(byte_fallback=True, unk_piece="<unk>", unk_id=0)
    proto = SimpleNamespace(pieces=pieces, normalizer_spec=spec, trainer_spec=trainer)
    vocabulary = {piece.piece: token for token, piece in enumerate(pieces)}
    reference = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary, legacy=legacy)
    reference.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return reference


def write_files(path: Path, files: dict[str, Any]) -> Path:
    """A directory with files of these contents: texts and bytes as they are, all else as JSON."""
    path.mkdir()
    for name, content in files.items():
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        (path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read_files(path: Path, n_vocab: int = 600) -> Tokenizer:
    """The tokenizer that a GGUF file made of the directory `path` would hold."""
    return Tokenizer.of_metadata(path, tokenizer_metadata(path, n_vocab))
