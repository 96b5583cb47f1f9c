"""A checkpoint's tokenizer as GGUF metadata, from `tokenizer.json` or else from `tokenizer.model`.

transformers reads tokenizer.json where both are there. So it counts here too, but for the scores of tokens: those are
tokenizer.model's where the other file's merges are not quite those of a sentencepiece model.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from slimoe.converter.source.tokenizer.check import check_json, check_model
from slimoe.converter.source.tokenizer.sentencepiece_model import SentencePieceModel
from slimoe.converter.source.tokenizer.settings import LLAMA_IDS, ROLES, AddedToken, TokenizerSettings
from slimoe.converter.source.tokenizer.space_prefix import SpacePrefix
from slimoe.converter.source.tokenizer.steps import inexpressible
from slimoe.converter.source.tokenizer.tokenizer_json import TokenizerJson
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import Value

_ADDED_SCORE = -1000.0


@dataclass(slots=True)
class _Token:
    text: str
    score: float
    type: int


def tokenizer_metadata(path: Path, n_vocab: int, class_ids: Mapping[str, int] = LLAMA_IDS) -> dict[str, Value]:
    """The keys of a checkpoint's tokenizer, padded to the `n_vocab` rows of the embedding.

    Raises ModelFileError when the directory has no tokenizer, a damaged one, or one with more tokens than rows, and
    UnsupportedModelError for one that a GGUF file cannot hold.
    """
    settings = TokenizerSettings.read(path, class_ids)
    json_path = path / "tokenizer.json"
    json_file = TokenizerJson.read(json_path, settings) if json_path.is_file() else None
    added = settings.older_added | (json_file.added if json_file else {}) | settings.added
    _check_ids(path, json_file, added, n_vocab)
    origin, tokens, metadata = _base_tokens(path, json_file, settings)
    if len(tokens) > n_vocab:
        raise _too_many(path, len(tokens), n_vocab)
    # Tokens that have a role are special, even where no list of added tokens has them.
    by_text = {token.text: n for n, token in enumerate(tokens)}
    names = {"pad": json_file.padding_token if json_file else None} | settings.texts
    named = {by_text[text]: AddedToken(text, special=True) for text in names.values() if text in by_text}
    for number, entry in sorted((named | added).items()):
        kind = TokenType.CONTROL if entry.special else TokenType.USER_DEFINED
        while len(tokens) < number:
            tokens.append(_Token(f"[PAD{len(tokens)}]", _ADDED_SCORE, TokenType.UNUSED))
        if number == len(tokens):
            tokens.append(_Token(entry.content, _ADDED_SCORE, kind))
        elif tokens[number].type in (TokenType.NORMAL, TokenType.USER_DEFINED) or tokens[number].text != entry.content:
            tokens[number] = _Token(entry.content, tokens[number].score, kind)
    tokens += [_Token(f"[PAD{n}]", _ADDED_SCORE, TokenType.UNUSED) for n in range(len(tokens), n_vocab)]
    metadata[keys.TOKENS] = [token.text for token in tokens]
    metadata[keys.TOKEN_TYPES] = [int(token.type) for token in tokens]
    is_bytes = metadata[keys.TOKENIZER_MODEL] == keys.BYTE_LEVEL
    if not is_bytes:
        metadata[keys.SCORES] = [token.score for token in tokens]
    ids = {token.text: n for n, token in reversed(list(enumerate(tokens)))}
    roles = {role: settings.role_id(short, ids, n_vocab) for role, short in ROLES.items()}
    metadata |= _around(json_file, settings, ids, roles)
    metadata |= {keys.token_id_key(role): token for role, token in roles.items() if token is not None}
    # The ends of answers besides eos: llama.cpp knows two more, all others stand in a key of our own.
    ends = [token for token in settings.end_ids(ids, n_vocab) if token != roles["eos"]]
    metadata |= {keys.token_id_key(role): token for role, token in zip(("eot", "eom"), ends, strict=False)}
    metadata |= {keys.END_TOKEN_IDS: ends[2:]} if ends[2:] else {}
    if origin.suffix == ".json":
        check_json(origin, metadata, settings.llama_prefix if settings.is_llama_class and not is_bytes else None)
    else:
        check_model(origin, metadata)
    return metadata | ({keys.CHAT_TEMPLATE: settings.chat_template} if settings.chat_template else {})


def _check_ids(path: Path, json_file: TokenizerJson | None, added: dict[int, AddedToken], n_vocab: int) -> None:
    """Refuses ids that the model has no embeddings for, and added tokens that are looked for in ways of their own."""
    highest = max((json_file.highest_id if json_file else -1, *added))
    if highest >= n_vocab:
        raise _too_many(path, highest + 1, n_vocab)
    texts = {token: text for text, token in json_file.model.vocab.items()} if json_file else {}
    for token, entry in added.items():
        name = f"{entry.content!r:.100}"
        if texts.get(token, entry.content) != entry.content:
            problem = f"the added token {name} has the id {token}, which is {texts[token]!r:.100} in tokenizer.json."
            raise ModelFileError(path, problem, "Download the tokenizer again.")
        if token < 0:
            raise ModelFileError(path, f"the added token {name} has the id {token}.", "Download the tokenizer again.")
        for flag in ("lstrip", "rstrip", "single_word"):
            if getattr(entry, flag):
                raise inexpressible(path, "added token", f"{name} with {flag}")
        is_decomposed = json_file and json_file.is_composed and not unicodedata.is_normalized("NFC", entry.content)
        if json_file and (json_file.has_normalizer or is_decomposed) and entry.is_normalized:
            raise inexpressible(path, "added token", f"{name} with normalized")


def _too_many(path: Path, n_tokens: int, n_vocab: int) -> ModelFileError:
    problem = f"the tokenizer has {n_tokens} tokens, but the model only {n_vocab} embeddings."
    return ModelFileError(path, problem, "Use the tokenizer that belongs to these weights.")


def _base_tokens(
    path: Path, json_file: TokenizerJson | None, settings: TokenizerSettings
) -> tuple[Path, list[_Token], dict[str, Value]]:
    """The tokens before any were added, where they stand, and the keys that only their kind decides."""
    model_path = path / "tokenizer.model"
    if json_file is None:
        if not model_path.is_file():
            raise ModelFileError(path, "the checkpoint has no tokenizer.model and no tokenizer.json.")
        model = SentencePieceModel.read(model_path)
        is_legacy = settings.legacy is not False
        prefix = SpacePrefix(model.add_dummy_prefix, is_legacy, is_legacy)
        kind: dict[str, Value] = {keys.TOKENIZER_MODEL: keys.SENTENCEPIECE, keys.TOKENIZER_PRE: "default"}
        user_defined = [piece.text for piece in model.pieces if piece.type == TokenType.USER_DEFINED]
        if user_defined and prefix.is_added and not settings.is_llama_class:
            # llama.cpp takes them out of a text before it adds spaces, sentencepiece and transformers after.
            raise inexpressible(model_path, "setting", f"user_defined_symbols ({user_defined[0]!r:.100})")
        prefix = settings.llama_prefix if settings.is_llama_class else prefix
        return model_path, _pieces(model), kind | prefix.metadata()
    try:
        json_file.check_merges(settings.texts.values())
    except UnsupportedModelError:
        if not model_path.is_file():
            listed = json_file.with_listed_merges()
            if listed is None:
                raise
            return json_file.path, [_Token(*token) for token in listed.tokens()], listed.metadata()
        tokens = _pieces(SentencePieceModel.read(model_path))
        if {token.text: n for n, token in enumerate(tokens)} != json_file.model.vocab:
            raise
        return model_path, tokens, json_file.metadata()
    return json_file.path, [_Token(*token) for token in json_file.tokens()], json_file.metadata()


def _pieces(model: SentencePieceModel) -> list[_Token]:
    # GGUF's user-defined tokens are matched in the raw text, sentencepiece's in the escaped one.
    texts = [p.text.replace("▁", " ") if p.type == TokenType.USER_DEFINED else p.text for p in model.pieces]
    return [_Token(text, p.score, p.type) for text, p in zip(texts, model.pieces, strict=True)]


def _around(
    json_file: TokenizerJson | None, settings: TokenizerSettings, ids: dict[str, int], roles: dict[str, int | None]
) -> dict[str, Value]:
    """Whether a BOS is put before texts and an EOS behind them: tokenizer.json decides, or else the settings."""
    values: dict[str, Value] = {}
    if json_file:
        for key, role, names in ((keys.ADD_BOS, "bos", json_file.before), (keys.ADD_EOS, "eos", json_file.behind)):
            if len(names) > 1 or (names and names[0] not in ids):
                raise inexpressible(json_file.path, "post-processor", f"TemplateProcessing with {', '.join(names)}")
            if names and roles[role] is None:
                roles[role] = ids[names[0]]
            if names and roles[role] != ids[names[0]]:
                raise inexpressible(json_file.path, "post-processor", f"TemplateProcessing with {names[0]}")
            values[key] = bool(names)
        return values
    for key, flag in ((keys.ADD_BOS, settings.add_bos), (keys.ADD_EOS, settings.add_eos)):
        if flag is not None:
            values[key] = flag
    return values
