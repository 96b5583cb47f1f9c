"""A GGUF file's vocabulary: read from its metadata, and as libllama's own tokenizer made from it in memory.

No file is loaded by libllama, so files that it refuses (other architectures, old layouts, shards) tokenise too.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from gguf import TokenType

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.ggml import llama
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import GGUFFile, number_array
from slimoe.offload.text.interrupts import interrupts_held
from slimoe.offload.text.text_blocks import TextBlocks, check_runs

_NO_TOKENIZER = ("", "none", "no_vocab")
_END_KEYS = tuple(keys.token_id_key(role) for role in ("eos", "eot", "eom"))
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_OWN_SPLITTERS = ("gpt-2", "llama-bpe", "dbrx", "qwen2")
"""Byte-level pre-tokenizers that libllama splits by code of its own, not by std::regex."""
MOST_SPECIAL_SQUARES = 1 << 25
"""The sum of the squared lengths of all special tokens that is allowed: a text is searched for each of their
beginnings. Real vocabularies come to a million, with thousands of tokens that nothing uses."""
_CONVERT_AGAIN = "Convert the model again, from a directory with its tokenizer."


@dataclass(frozen=True, slots=True)
class VocabularySpec:
    """A file's vocabulary as its metadata has it: `texts` and `types` by token; the sets hold token ids.

    `control` tokens have no text of their own (unused and unknown ones count as such), `user_defined` ones are found
    in every text, and those of `ends` end an answer. `add_space_prefix` puts a space before a text,
    `prefix_after_special` one after each special token too, `prefix_before_space` even where the text has one.
    With `is_composed` texts are brought to Unicode's normal form C first.
    """

    model: str
    texts: list[str]
    types: tuple[int, ...]
    control: frozenset[int]
    user_defined: frozenset[int]
    ends: frozenset[int]
    add_space_prefix: bool
    prefix_after_special: bool
    prefix_before_space: bool
    is_composed: bool
    chat_template: str | None

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> "VocabularySpec":
        """The vocabulary of a file.

        Raises ModelFileError for no or a damaged tokenizer, UnsupportedModelError for a kind that is not known.
        """
        metadata = gguf.metadata
        model = metadata.get(keys.TOKENIZER_MODEL, "")
        if model in _NO_TOKENIZER:
            raise ModelFileError(gguf.path, "the file holds no tokenizer.", _CONVERT_AGAIN)
        if model not in (keys.SENTENCEPIECE, keys.BYTE_LEVEL, keys.BYTE_FALLBACK):
            known = "llama (sentencepiece), gpt2 (byte-level BPE) and gemma4 (BPE with bytes) are known"
            problem = f"the tokenizer is of kind {model!r:.100}; {known}."
            raise UnsupportedModelError(gguf.path, problem)
        texts = metadata.get(keys.TOKENS)
        if not isinstance(texts, list) or not texts:
            raise ModelFileError(gguf.path, f"the tokenizer has no token list ({keys.TOKENS}).", _CONVERT_AGAIN)
        types = _types(gguf, texts)
        template = metadata.get(keys.CHAT_TEMPLATE)
        control = _of_type(types, TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED)
        user_defined = _of_type(types, TokenType.USER_DEFINED)
        special = [texts[token] for token in control | user_defined]
        if sum(len(text) ** 2 for text in special) > MOST_SPECIAL_SQUARES:
            longest = max(map(len, special))
            problem = f"{len(special)} special tokens, up to {longest} characters long, are too long in all."
            raise UnsupportedModelError(gguf.path, f"the tokenizer's {problem}")
        normalizer = metadata.get(keys.NORMALIZER)
        if normalizer not in (None, "nfc"):
            problem = f"{keys.NORMALIZER} is {normalizer!r:.100}, but only nfc is known."
            raise UnsupportedModelError(gguf.path, problem, "Update slimoe, or convert the model again.")
        return cls(
            model=model,
            texts=texts,
            types=types,
            control=control,
            user_defined=user_defined,
            ends=_ends(gguf, len(texts)),
            add_space_prefix=_flag(gguf, keys.ADD_SPACE_PREFIX) and model == keys.SENTENCEPIECE,
            prefix_after_special=_flag(gguf, keys.PREFIX_AFTER_SPECIAL),
            prefix_before_space=_flag(gguf, keys.PREFIX_BEFORE_SPACE),
            is_composed=normalizer is not None,
            chat_template=template if isinstance(template, str) else None,
        )


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of `text`, in which half a surrogate pair, which JSON can hold, becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def raw_bytes(text: str) -> bytes:
    """The bytes of a string of the metadata, which need not be valid UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _types(gguf: GGUFFile, texts: list[str]) -> tuple[int, ...]:
    """The tokens' types; an old file without any has bytes and sentence marks by their names."""
    types = gguf.metadata.get(keys.TOKEN_TYPES)
    if types is None:
        named = {"<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL, "<unk>": TokenType.UNKNOWN}
        named |= dict.fromkeys(_BYTES, TokenType.BYTE)
        return tuple(int(named.get(text, TokenType.NORMAL)) for text in texts)
    is_array = isinstance(types, np.ndarray) and types.dtype.kind in "iu" and len(types) == len(texts)
    if not is_array or types.min() < 0 or types.max() > max(TokenType):
        problem = f"the tokenizer's {keys.TOKEN_TYPES} does not have one entry for each of the {len(texts)} tokens."
        raise ModelFileError(gguf.path, problem, _CONVERT_AGAIN)
    return tuple(types.tolist())


def _ends(gguf: GGUFFile, n_vocab: int) -> frozenset[int]:
    """The ids that the file says end an answer; those that are no tokens are left out, as llama.cpp does it."""
    ids = [gguf.metadata[key] for key in _END_KEYS if key in gguf.metadata]
    further = number_array(gguf.metadata.get(keys.END_TOKEN_IDS, []))
    if further is None or (further.size and further.dtype.kind != "i") or any(type(token) is not int for token in ids):
        problem = f"{', '.join((*_END_KEYS, keys.END_TOKEN_IDS))} are not all numbers of tokens."
        raise ModelFileError(gguf.path, problem, _CONVERT_AGAIN)
    return frozenset(token for token in (*ids, *further.tolist()) if 0 <= token < n_vocab)


def _flag(gguf: GGUFFile, key: str) -> bool:
    value = gguf.metadata.get(key, True)
    if not isinstance(value, bool):
        raise ModelFileError(gguf.path, f"{key} is {value!r:.100}, but true or false belongs there.", _CONVERT_AGAIN)
    return value


def _of_type(types: tuple[int, ...], *wanted: TokenType) -> frozenset[int]:
    return frozenset(token for token, kind in enumerate(types) if kind in wanted)


class LlamaVocab:
    """libllama's vocabulary: encodes text in which no special token is, and knows the pieces of plain tokens."""

    def __init__(self, gguf: GGUFFile, spec: VocabularySpec) -> None:
        names = _library_names(spec)
        self._n_vocab = len(spec.texts)
        self._blocks = TextBlocks(spec.texts) if spec.model == keys.SENTENCEPIECE else None
        is_split = spec.model != keys.BYTE_FALLBACK  # at line ends, by code of its own
        self._splits_by_std_regex = is_split and gguf.metadata.get(keys.TOKENIZER_PRE) not in _OWN_SPLITTERS
        self._unknown = min(_of_type(spec.types, TokenType.UNKNOWN), default=0)
        self._model: int | None = _load(gguf, spec, names)
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.bos = _token_or_none(llama.llama_vocab_bos(self._vocab))
        self.eos = _token_or_none(llama.llama_vocab_eos(self._vocab))
        self.add_bos = bool(llama.llama_vocab_get_add_bos(self._vocab))

    def close(self) -> None:
        """Frees the vocabulary; may be called twice."""
        if self._model is not None:
            llama.llama_model_free(self._model)
        self._model = self._vocab = None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without space prefix; runs of what no token can spell are one unknown.

        Raises UsageError for one that libllama cannot split.
        """
        if self._blocks is None:
            if self._splits_by_std_regex:
                check_runs(text)
            tokens = self._encode_block(utf8(text))
        else:
            tokens = [token for block in self._blocks.cut(text) for token in self._encode_block(utf8(block))]
        if not tokens or max(tokens) < self._n_vocab:
            return tokens
        kept = [self._unknown if token >= self._n_vocab else token for token in tokens]
        return [t for i, t in enumerate(kept) if i == 0 or (t, kept[i - 1]) != (self._unknown, self._unknown)]

    def _encode_block(self, text: bytes) -> list[int]:
        assert self._vocab is not None, "the tokenizer is closed"
        n_max = len(text) + 2 * text.count(b" ") + 8  # a space is written ▁, of three bytes that may all be tokens
        buffer = (ctypes.c_int32 * n_max)()
        n = llama.llama_tokenize(self._vocab, text, len(text), ctypes.addressof(buffer), n_max, False, False)
        assert n >= 0, "a text has more tokens than its bytes with spaces written out"
        return buffer[:n]

    def piece(self, token: int) -> bytes:
        """The bytes of a plain token."""
        assert self._vocab is not None, "the tokenizer is closed"
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama.llama_token_to_piece(self._vocab, token, ctypes.addressof(buffer), size, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            size = -n


def _token_or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _library_names(spec: VocabularySpec) -> list[bytes]:
    """Each token's name for libllama: unique, and for those that text must not spell, out of reach of its merges.

    A merge joins two tokens. A name of a control character, digits and another one has no multi-character part
    that is a token. Vocabularies that spell by bytes without all 256 of them get the missing ones as further tokens.
    """
    names: list[bytes] = []
    seen: set[bytes] = set()
    hidden = spec.control | spec.user_defined
    for token, text in enumerate(spec.texts):
        name = raw_bytes(text)
        if token in hidden or not name or b"\0" in name or name in seen:
            name = b"\x02%d\x03" % token
        seen.add(name)
        names.append(name)
    missing = [name.encode() for name in _BYTES if name.encode() not in seen]
    return names + (missing if spec.model != keys.BYTE_LEVEL else [])


def _load(gguf: GGUFFile, spec: VocabularySpec, names: list[bytes]) -> int:
    """libllama's model of only a vocabulary; raises UnsupportedModelError with libllama's reason."""
    metadata = llama.gguf_init_empty()
    try:
        _set_metadata(metadata, gguf, spec, names)
        params = llama.llama_model_default_params()
        params.vocab_only = True
        with interrupts_held(), _captured_log() as log:
            model = llama.llama_model_init_from_user(metadata, None, None, params)
    finally:
        llama.gguf_free(metadata)
    if model is None:
        reason = next((line.split("vocabulary:")[-1].strip() for line in log if "error loading" in line), "no reason")
        raise UnsupportedModelError(gguf.path, f"llama.cpp does not accept the tokenizer ({reason}).")
    return int(model)


def _set_metadata(target: int, gguf: GGUFFile, spec: VocabularySpec, names: list[bytes]) -> None:
    """Gives libllama's `target` the file's tokenizer with these `names`. Raises ModelFileError for bad scores."""
    llama.gguf_set_val_str(target, b"general.architecture", b"llama")
    for key, value in gguf.metadata.items():
        if not key.startswith("tokenizer.ggml.") or key == keys.ADD_SPACE_PREFIX:
            continue
        if isinstance(value, bool):
            llama.gguf_set_val_bool(target, key.encode(), value)
        elif isinstance(value, int) and key.endswith("_id") and value >= 0:
            llama.gguf_set_val_u32(target, key.encode(), value)
        elif isinstance(value, str):
            llama.gguf_set_val_str(target, key.encode(), raw_bytes(value))
    llama.gguf_set_val_bool(target, keys.ADD_SPACE_PREFIX.encode(), False)
    n_extra = len(names) - len(spec.texts)
    _set_strings(target, keys.TOKENS, names)
    types = np.array([*spec.types, *[TokenType.BYTE] * n_extra], np.int32)
    llama.gguf_set_arr_data(target, keys.TOKEN_TYPES.encode(), llama.GGUF_INT32, types.ctypes.data, len(types))
    scores = gguf.metadata.get(keys.SCORES)
    if scores is not None:
        if not isinstance(scores, np.ndarray) or len(scores) != len(spec.texts) or not np.isfinite(scores).all():
            problem = f"the tokenizer's {keys.SCORES} does not have one entry for each of the {len(spec.texts)} tokens."
            raise ModelFileError(gguf.path, problem, _CONVERT_AGAIN)
        padded = np.concatenate([np.asarray(scores, np.float32), np.zeros(n_extra, np.float32)])
        llama.gguf_set_arr_data(target, keys.SCORES.encode(), llama.GGUF_FLOAT32, padded.ctypes.data, len(padded))
    merges = gguf.metadata.get(keys.MERGES)
    if isinstance(merges, list):
        _set_strings(target, keys.MERGES, [raw_bytes(merge) for merge in merges])


def _set_strings(target: int, key: str, values: list[bytes]) -> None:
    array = (ctypes.c_char_p * len(values))(*values)
    llama.gguf_set_arr_str(target, key.encode(), ctypes.addressof(array), len(values))


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Collects libllama's error lines meanwhile, and then gives its log back to whoever had it."""
    lines: list[str] = []

    def keep(level: int, text: bytes, _data: object) -> None:
        if level == llama.LOG_ERROR:
            lines.append(text.decode("utf-8", "replace"))

    callback = llama.LOG_CALLBACK(keep)
    before, data = ctypes.c_void_p(), ctypes.c_void_p()
    llama.llama_log_get(ctypes.addressof(before), ctypes.addressof(data))
    llama.llama_log_set(ctypes.cast(callback, ctypes.c_void_p).value, None)
    try:
        yield lines
    finally:
        llama.llama_log_set(before.value, data.value)
