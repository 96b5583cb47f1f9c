"""Long texts: the same tokens as in one piece, and nothing that crashes the library."""

import random
from pathlib import Path

import gguf
import pytest
import sentencepiece

from slimoe.offload.errors import UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.text.text_blocks import BLOCK, MAX_RUN, TextBlocks
from slimoe.offload.text.tokenizer import Tokenizer
from tests.models.gguf_content import finish
from tests.models.tiny_checkpoint import train_sentencepiece
from tests.models.tiny_gguf import write_vocabulary

WORDS = ("hello", " world", "ψψ", "Ω", "日本語", " ", "  ", "\n", "<s>", "é", "naïve", "🙂", "x1")


def long_text(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) * rng.choice((1, 1, 1, 40)) for _ in range(4 * BLOCK // 8)) + "Ω" * (2 * BLOCK)


def test_blocks_are_the_text_and_no_token_reaches_over_their_ends() -> None:
    blocks = TextBlocks(["a", "ab", "▁b", "Ω"])
    text = "ab ab" * BLOCK + "Ω" * (3 * BLOCK) + "b" * BLOCK
    cut = list(blocks.cut(text))
    assert "".join(cut) == text
    assert len(cut) > 3
    assert {block[-1] for block in cut[:-1]} == {"Ω"}
    assert all(len(block) == BLOCK + 1 for block in cut[1:-1])
    assert list(TextBlocks(["ab"]).cut("ab" * BLOCK)) == ["ab" * BLOCK]
    assert list(blocks.cut("")) == [""]


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_long_texts_have_sentencepieces_ids(tmp_path: Path, byte_fallback: bool) -> None:
    model = train_sentencepiece(tmp_path / "tokenizer.model", byte_fallback=byte_fallback)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = Tokenizer.open(read_gguf(write_vocabulary(tmp_path / "v.gguf", model)))
    for seed in range(3):
        text = long_text(seed)
        assert tokenizer.encode(text) == processor.encode(text)
    tokenizer.close()


def byte_level(path: Path, pre: str) -> Tokenizer:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, plain), *(chr(256 + n) for n in range(256 - len(plain)))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<s>", "</s>", *letters, "aa"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    finish(writer)
    return Tokenizer.open(read_gguf(path))


@pytest.mark.parametrize("run", ["a", " ", "!", "日"])
def test_runs_that_overflow_the_librarys_stack_are_refused(tmp_path: Path, run: str) -> None:
    """libllama itself crashes on 40,000 of them."""
    tokenizer = byte_level(tmp_path / "v.gguf", "tekken")
    assert len(tokenizer.encode(run * MAX_RUN)) >= MAX_RUN / 2
    with pytest.raises(UsageError, match=f"more than {MAX_RUN} letters"):
        tokenizer.encode("a b " + run * (MAX_RUN + 2))
    tokenizer.close()


def test_runs_are_no_matter_where_the_library_splits_by_its_own_code(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "v.gguf", "llama-bpe")
    assert len(tokenizer.encode("a" * 100_000)) == 50_000
    tokenizer.close()
