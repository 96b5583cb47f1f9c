import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece

from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.text.tokenizer import Tokenizer
from tests.models.gguf_content import finish
from tests.models.tiny_checkpoint import train_sentencepiece
from tests.models.tiny_gguf import write_vocabulary
from tests.models.tokenizer_files import gemma, gemma_metadata

ADDED = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def processor(sentencepiece_path: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    path = write_vocabulary(tmp_path_factory.mktemp("vocab") / "v.gguf", sentencepiece_path, added=ADDED)
    tokenizer = Tokenizer.open(read_gguf(path))
    yield tokenizer
    tokenizer.close()


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_ids_text_and_bytes_are_sentencepieces(tokenizer: Tokenizer, processor: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == processor.decode(ids) == text.replace("▁", " ")
    assert b"".join(map(tokenizer.piece, ids)) == (" " + text.replace("▁", " ") if text else "").encode()


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_ids_of_gemmas_kind_are_transformers(sentencepiece_path: Path, text: str) -> None:
    """BPE over whole lines, in which a space is a mark, and what is in no token is spelled in bytes."""
    reference = gemma(sentencepiece_path)
    with closing(Tokenizer.of_metadata(Path("m.gguf"), gemma_metadata(reference))) as tokenizer:
        ids = tokenizer.encode(text)
        plain = reference.backend_tokenizer.encode(text.replace("<unk>", "< unk>").replace("s>", "s >"))
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        assert tokenizer.encode(text.replace("<unk>", "< unk>").replace("s>", "s >")) == plain.ids
        assert tokenizer.encode("a", add_bos=True) == [1, *tokenizer.encode("a")]


def test_a_line_of_gemmas_kind_may_be_long(sentencepiece_path: Path) -> None:
    with closing(Tokenizer.of_metadata(Path("m.gguf"), gemma_metadata(gemma(sentencepiece_path)))) as tokenizer:
        text = "a" * 100_000
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_tempts_to_build_special_tokens(processor: Any) -> None:
    pieces = {processor.id_to_piece(i) for i in range(processor.vocab_size())}
    assert {"</s", ">"} <= pieces


def test_special_tokens_are_tokens_only_when_asked_for(tokenizer: Tokenizer, processor: Any) -> None:
    n = tokenizer.n_vocab
    assert n == processor.vocab_size() + 2
    text = "a</s>b<|im_end|>"
    assert not {1, 2, n - 1} & set(tokenizer.encode(text))
    assert tokenizer.encode(text, parse_special=True) == [*processor.encode("a"), 2, *processor.encode("b"), n - 1]
    assert tokenizer.encode("a", add_bos=True) == [1, *processor.encode("a")]


def test_a_prompt_in_segments(tokenizer: Tokenizer, processor: Any) -> None:
    content = "</s> [INST] x"
    ids = tokenizer.encode_segments([1, "[INST] ", content, " [/INST]", 2, "next", 2])
    expected = [1, *processor.encode(f"[INST] {content} [/INST]"), 2, *processor.encode("next"), 2]
    assert ids == expected
    assert tokenizer.encode_segments([]) == tokenizer.encode_segments([""]) == []


def test_what_the_tokens_are(tokenizer: Tokenizer, processor: Any) -> None:
    n = tokenizer.n_vocab
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.eog == {2, n - 1}
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": n - 2, "<|im_end|>": n - 1}
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.token_text(2) == "</s>"
    assert (tokenizer.piece(2), tokenizer.piece(2, special=True)) == (b"", b"</s>")
    assert tokenizer.piece(processor.piece_to_id("<0xFF>")) == b"\xff"
    with pytest.raises(IndexError):
        tokenizer.piece(n)


@pytest.mark.parametrize(
    ("names", "inner"),
    [
        (("<|end|>", "<|return|>", "<|call|>"), {"<|end|>"}),
        (("<|end|>", "<|flush|>", "<|calls|>"), {"<|end|>"}),
        (("<|end|>", "<|return|>"), set()),
        (("<|end|>", "<|call|>"), set()),
        (("<|end|>",), set()),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, tuple) else "",
)
def test_an_end_of_a_part_does_not_end_an_answer(
    tmp_path: Path, sentencepiece_path: Path, names: tuple[str, ...], inner: set[str]
) -> None:
    """As harmony has it: parts end with `<|end|>`, answers with `<|return|>` and calls with `<|call|>`."""
    tokenizer = Tokenizer.open(read_gguf(write_vocabulary(tmp_path / "v.gguf", sentencepiece_path, added=names)))
    assert {tokenizer.token_text(token) for token in tokenizer.eog} == {"</s>", *names} - inner
    tokenizer.close()


def test_half_a_surrogate_pair_is_a_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud83db") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


@pytest.mark.parametrize("text", ["ab<code>cd", "<code>", "<code> <code>x", "x<code>  y", "日本<code>語"])
def test_user_defined_symbols_and_no_byte_fallback(tmp_path: Path, text: str) -> None:
    model = train_sentencepiece(tmp_path / "tokenizer.model", byte_fallback=False, user_symbols=("<code>",))
    tokenizer = Tokenizer.open(read_gguf(write_vocabulary(tmp_path / "v.gguf", model, user=("<code>",))))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for nasty in (text, text + "👩‍👧 δδδ b 😀", *HARD_TEXTS):
        assert tokenizer.encode(nasty) == processor.encode(nasty)


def test_tokens_that_llama_cpp_cannot_hold_twice(tmp_path: Path, sentencepiece_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", sentencepiece_path, added=("a", "a", "", "</s>"))
    tokenizer = Tokenizer.open(read_gguf(path))
    assert tokenizer.decode(tokenizer.encode("a b a")) == "a b a"
    assert tokenizer.special_tokens["</s>"] == 2


def test_byte_level_bpe(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    reference: Any = ByteLevelBPETokenizer()
    reference.train_from_iterator(HARD_TEXTS * 3, vocab_size=400, show_progress=False)
    vocabulary = sorted(reference.get_vocab(), key=reference.get_vocab().__getitem__)
    merges = [" ".join(merge) for merge in json.loads(reference.to_str())["model"]["merges"]]
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*vocabulary, "<|endoftext|>"])
    writer.add_token_types([1] * len(vocabulary) + [3])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(vocabulary))
    finish(writer)
    tokenizer = Tokenizer.open(read_gguf(tmp_path / "v.gguf"))
    for text in HARD_TEXTS:
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eog == {len(vocabulary)}


def vocabulary_without(path: Path, key: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    adders: dict[str, Callable[[], None]] = {
        "model": lambda: writer.add_tokenizer_model("llama"),
        "list": lambda: writer.add_token_list(["<unk>", "<s>", "</s>", "a"]),
        "types": lambda: writer.add_token_types([2, 3, 3, 1]),
        "scores": lambda: writer.add_token_scores([0.0] * 4),
    }
    for name, add in adders.items():
        if name != key:
            add()
    finish(writer)


@pytest.mark.parametrize(("key", "message"), [("model", "no tokenizer"), ("list", "no token list")])
def test_no_tokenizer(tmp_path: Path, key: str, message: str) -> None:
    vocabulary_without(tmp_path / "v.gguf", key)
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.open(read_gguf(tmp_path / "v.gguf"))


@pytest.mark.parametrize(("model", "pre", "message"), [("bert", "x", "bert"), ("gpt2", "nonesuch", "nonesuch")])
def test_unknown_tokenizer(tmp_path: Path, model: str, pre: str, message: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["a"])
    writer.add_token_merges(["a a"])
    finish(writer)
    with pytest.raises(UnsupportedModelError, match=message):
        Tokenizer.open(read_gguf(tmp_path / "v.gguf"))


@pytest.mark.parametrize("key", ["types", "scores"])
def test_lists_of_unequal_length(tmp_path: Path, key: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    writer.add_token_types([2, 3, 3, 1][: 3 if key == "types" else 4])
    writer.add_token_scores([0.0] * (3 if key == "scores" else 4))
    finish(writer)
    with pytest.raises(ModelFileError, match="one entry for each"):
        Tokenizer.open(read_gguf(tmp_path / "v.gguf"))


def test_a_vocabulary_without_a_space(tmp_path: Path) -> None:
    """Every space is then three tokens, one for each byte of sentencepiece's mark."""
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_types([2, 3, 3, *[6] * 256])
    writer.add_token_scores([0.0] * 259)
    finish(writer)
    tokenizer = Tokenizer.open(read_gguf(tmp_path / "v.gguf"))
    text = "a " * 100
    assert tokenizer.encode(text) == [3 + byte for byte in (" " + text).replace(" ", "▁").encode()]
    tokenizer.close()


@pytest.mark.parametrize(("n_long", "length", "is_fine"), [(1, 5000, True), (1, 100_000, False), (200, 1000, False)])
def test_special_tokens_that_fill_memory_are_refused(tmp_path: Path, n_long: int, length: int, is_fine: bool) -> None:
    """Beginnings and ends of special tokens are looked for in clients' texts: their sizes add up as squares."""
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_tokenizer_model("llama")
    texts = ["<unk>", "<s>", "</s>", "a", *(f"{n:03}" + "x" * (length - 3) for n in range(n_long))]
    writer.add_token_list(texts)
    writer.add_token_types([2, 3, 3, 1, *[3] * n_long])
    writer.add_token_scores([0.0] * len(texts))
    finish(writer)
    file = read_gguf(tmp_path / "v.gguf")
    if is_fine:
        Tokenizer.open(file).close()
    else:
        with pytest.raises(UnsupportedModelError, match=f"{n_long + 3} special tokens, up to {length} characters"):
            Tokenizer.open(file)
