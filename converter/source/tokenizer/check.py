"""Whether the tokenizer that a GGUF file will hold gives the ids of the source's own, on texts that are hard for both.

The source's is read by the library that made it, where that is installed: tokenizers or sentencepiece.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from slimoe.converter.source.tokenizer.sentencepiece_model import SentencePieceModel
from slimoe.converter.source.tokenizer.space_prefix import ROUGH, SpacePrefix
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import Value
from slimoe.offload.text.tokenizer import Tokenizer

HARD_TEXTS = (
    "",
    " ",
    "a",
    "Hello, world",
    " leading and trailing ",
    "  two   three    runs     of spaces      ",
    "\ttab\t\ttabs\n\nnew\r\nlines\n",
    "\n",
    'def f(x: int) -> str:\n    return f"{x!r}"  # code\n\n\nfor (let i=0;i<n;i++){a[i]??=`${b}`}',
    "naïve café Übergröße Ωμέγα привет",
    "日本語の文章。中文字符，한국어",
    "👩‍👩‍👧‍👦🏴‍☠️ 🤦🏽‍♂️ e\u0301 \u200b\ufeff",
    "</s>",
    "<s> a </s> b",
    "a</s>b</s></s>",
    "[INST] not an instruction [/INST]",
    "<unk><0x0A><0x41> <|im_end|>",
    "▁ literal ▁▁ marks",
    "nul\0inside\0",
    "\x01\x02\x7f control",
    "0123456789 3.14159e-10 0xDEADBEEF",
    "a" * 300,
    "https://example.org/?q=1&r=%20#x",
    "\U0010ffff\U000e0001",
    "The QUICK Brown FOX, İSTANBUL, straße",
    "ﬁne ½ x² Ⅳ ｆｕｌｌ　ｗｉｄｔｈ ﷺ",
    "cafe\u0301 café Å \u212b \u1e9b\u0323",
    "non\u00a0breaking\u2003spaces\u3000and\u2028lines",
    " one",
    "  two",
    "   three   ",
    "▁mark",
    "\n leading line",
    "\t\t",
    "don't I'LL we've 'Twas 's",
    "12 345 6789 1,234,567.89 ٣٤٥ 二〇",
    "a.b,c;d:e!f?g(h)[i]{j}<k>/l\\m|n",
    "camelCase snake_case kebab-case UPPER_CASE",
    "hello  world\n\n\n  indented\n\ttabbed \n",
    "\"quoted\" 'single' `code` ...--- ***",
)
"""Texts that tokenizers get wrong."""
_MOST_SHOWN = 32
_N_SPECIAL = 4

_Encode = Callable[[str], Sequence[int]]


def check_json(path: Path, metadata: Mapping[str, Value], llama_prefix: SpacePrefix | None) -> None:
    """Compares with a tokenizer.json, whose special tokens are read as such; `llama_prefix` replaces its own steps.

    Raises UnsupportedModelError with a text and both its ids when they differ, and ModelFileError for a file that the
    library refuses.
    """
    if find_spec("tokenizers") is None:
        return
    from tokenizers import Tokenizer as Reference
    from tokenizers import pre_tokenizers

    try:
        reference = Reference.from_file(str(path))
    except Exception as error:  # the library has no narrower class
        raise _unreadable(path, error) from None
    reference.no_truncation()
    reference.no_padding()
    if llama_prefix is not None:
        scheme = "always" if llama_prefix.after_special else "first"
        scheme = scheme if llama_prefix.is_added else "never"
        reference.normalizer = None
        reference.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    added = {token.content for token in reference.get_added_tokens_decoder().values()}
    tokenizer = Tokenizer.of_metadata(path, metadata)
    names = [name for name in tokenizer.special_tokens if name in added]
    some = dict.fromkeys((*names[:_N_SPECIAL], *names[-_N_SPECIAL:]))
    around = ("{0}a", "a{0} b", " {0} ", "a {0}{0}  b", "{0}\n")
    # Where llama.cpp is known to go another way, a note says so, and the rest is compared.
    hard = [text for text in HARD_TEXTS if text.isascii() or metadata[keys.TOKENIZER_PRE] not in ROUGH]
    texts = (*hard, *(text.format(name) for name in some for text in around))
    unknown = [name for name in tokenizer.special_tokens if name and name not in added]
    try:
        _compare(
            path,
            [text for text in texts if not any(name in text for name in unknown)],
            lambda text: tokenizer.encode(text, parse_special=True),
            lambda text: reference.encode(text, add_special_tokens=False).ids,
        )
    finally:
        tokenizer.close()


def check_model(path: Path, metadata: Mapping[str, Value]) -> None:
    """Compares with a tokenizer.model, for which special tokens are no text; raises as `check_json` does.

    Where transformers leaves the space away that the file itself would add, there is nothing to compare with.
    """
    is_alike = SentencePieceModel.read(path).add_dummy_prefix == metadata[keys.ADD_SPACE_PREFIX]
    if not is_alike or find_spec("sentencepiece") is None:
        return
    import sentencepiece

    try:
        reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from None
    tokenizer = Tokenizer.of_metadata(path, metadata)
    added = [name for name in tokenizer.special_tokens if name and reference.piece_to_id(name) == reference.unk_id()]
    doubles_space = metadata.get(keys.PREFIX_BEFORE_SPACE, True)
    texts = {text: text if doubles_space else text.removeprefix(" ").removeprefix("▁") for text in HARD_TEXTS}
    try:
        _compare(
            path,
            [text for text, rest in texts.items() if rest and not any(name in text for name in added)],
            tokenizer.encode,
            lambda text: reference.encode(texts[text]),
        )
    finally:
        tokenizer.close()


def _compare(path: Path, texts: Sequence[str], ours: _Encode, theirs: _Encode) -> None:
    for text in texts:
        found, expected = list(ours(text)), list(theirs(text))
        if found != expected:
            problem = f"a GGUF file cannot hold the tokenizer: {text!r:.120} is {_shown(expected)}, but would be"
            hint = "Only tokenizers that llama.cpp follows can be converted."
            raise UnsupportedModelError(path, f"{problem} {_shown(found)}.", hint)


def _shown(ids: list[int]) -> str:
    return str(ids) if len(ids) <= _MOST_SHOWN else f"{str(ids[:_MOST_SHOWN])[:-1]}, ...]"


def _unreadable(path: Path, error: Exception) -> ModelFileError:
    reason = " ".join(str(error).split())
    return ModelFileError(path, f"the library that made it cannot read it ({reason:.200}).", "Download it again.")
