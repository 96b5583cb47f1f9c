"""A checkpoint's tokenizer as GGUF metadata, from `tokenizer.model` or else from `tokenizer.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from converter.checkpoint import Checkpoint, read_json
from converter.sentencepiece_model import SentencePieceModel
from converter.tokenizer_json import TokenizerJson
from offload import file_keys as keys
from offload.errors import ModelFileError
from offload.gguf_file import Value

_ADDED_SCORE = -1000.0


@dataclass(slots=True)
class _Token:
    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class _Settings:
    """The small JSON files beside a tokenizer; each may be missing and is then empty."""

    tokenizer: dict[str, Any]
    generation: dict[str, Any]
    model: dict[str, Any]

    def ids(self, role: str) -> list[int]:
        """The ids that the model's and the generation's configuration give a role such as eos."""
        values = [config.get(f"{role}_token_id") for config in (self.generation, self.model)]
        flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
        return [v for v in dict.fromkeys(flat) if isinstance(v, int) and v >= 0]


def tokenizer_metadata(checkpoint: Checkpoint, n_vocab: int) -> dict[str, Value]:
    """The keys of the tokenizer, padded to the `n_vocab` rows of the embedding.

    Raises ModelFileError when the directory has no tokenizer, a damaged one, or one with more tokens than rows.
    """
    path = checkpoint.path
    settings = _Settings(
        _optional_json(path / "tokenizer_config.json"),
        _optional_json(path / "generation_config.json"),
        checkpoint.config,
    )
    json_file = TokenizerJson.read(path / "tokenizer.json") if (path / "tokenizer.json").is_file() else None
    tokens, metadata = _base_tokens(path, json_file)
    _add_tokens(path, tokens, json_file, settings)
    if len(tokens) > n_vocab:
        problem = f"the tokenizer has {len(tokens)} tokens, but the model only {n_vocab} embeddings."
        raise ModelFileError(path, problem, "Use the tokenizer that belongs to these weights.")
    tokens += [_Token(f"[PAD{n}]", _ADDED_SCORE, TokenType.UNUSED) for n in range(len(tokens), n_vocab)]
    metadata[keys.TOKENS] = [token.text for token in tokens]
    metadata[keys.TOKEN_TYPES] = [int(token.type) for token in tokens]
    if metadata[keys.TOKENIZER_MODEL] == keys.SENTENCEPIECE:
        metadata[keys.SCORES] = [token.score for token in tokens]
    metadata |= _special_ids(settings, {token.text: n for n, token in reversed(list(enumerate(tokens)))})
    for key, name in ((keys.ADD_BOS, "add_bos_token"), (keys.ADD_EOS, "add_eos_token")):
        if isinstance(settings.tokenizer.get(name), bool):
            metadata[key] = settings.tokenizer[name]
    return metadata | _chat_template(path, settings)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _base_tokens(path: Path, json_file: TokenizerJson | None) -> tuple[list[_Token], dict[str, Value]]:
    """The tokens and the keys that only their kind decides. tokenizer.model is the authority where it exists."""
    if (path / "tokenizer.model").is_file():
        model = SentencePieceModel.read(path / "tokenizer.model")
        # GGUF's user-defined tokens are matched in the raw text, sentencepiece's in the escaped one.
        texts = [p.text.replace("▁", " ") if p.type == TokenType.USER_DEFINED else p.text for p in model.pieces]
        tokens = [_Token(text, p.score, p.type) for text, p in zip(texts, model.pieces, strict=True)]
        metadata: dict[str, Value] = {
            keys.TOKENIZER_MODEL: keys.SENTENCEPIECE,
            keys.TOKENIZER_PRE: "default",
            keys.ADD_SPACE_PREFIX: model.add_dummy_prefix,
        }
        if json_file and json_file.kind == keys.SENTENCEPIECE and not json_file.prefix_after_special:
            metadata[keys.PREFIX_AFTER_SPECIAL] = False
        return tokens, metadata
    if json_file is None:
        raise ModelFileError(path, "the checkpoint has no tokenizer.model and no tokenizer.json.")
    tokens = [_Token(text, score, kind) for text, score, kind in json_file.tokens()]
    return tokens, json_file.metadata()


def _add_tokens(path: Path, tokens: list[_Token], json_file: TokenizerJson | None, settings: _Settings) -> None:
    """Appends the tokens that were added after training, and marks those that the settings call special."""
    added: dict[int, tuple[str, bool]] = {}
    for text, token in _optional_json(path / "added_tokens.json").items():
        added[int(token)] = (text, False)
    if json_file is not None:
        added |= json_file.added_tokens
    for token, entry in settings.tokenizer.get("added_tokens_decoder", {}).items():
        added[int(token)] = (entry["content"], bool(entry.get("special")))
    for token, (text, special) in sorted(added.items()):
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        while len(tokens) < token:
            tokens.append(_Token(f"[PAD{len(tokens)}]", _ADDED_SCORE, TokenType.UNUSED))
        if token == len(tokens):
            tokens.append(_Token(text, _ADDED_SCORE, kind))
        elif tokens[token].type in (TokenType.NORMAL, TokenType.USER_DEFINED) or tokens[token].text != text:
            tokens[token] = _Token(text, tokens[token].score, kind)


def _special_ids(settings: _Settings, ids: dict[str, int]) -> dict[str, Value]:
    """bos, eos, unknown and padding by the tokenizer's names for them, and further ends of generation as eot."""
    found: dict[str, int] = {}
    for role, short in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        name = settings.tokenizer.get(f"{short}_token")
        text = name.get("content") if isinstance(name, dict) else name
        numbers = [n for n in settings.ids(short) if n < len(ids)]
        if isinstance(text, str) and text in ids:
            found[role] = ids[text]
        elif numbers:
            found[role] = numbers[0]
    further = [token for token in settings.ids("eos") if token != found.get("eos") and token < len(ids)]
    if further:
        found["eot"] = further[0]
    return {keys.token_id_key(role): token for role, token in found.items()}


def _chat_template(path: Path, settings: _Settings) -> dict[str, Value]:
    template: Any = settings.tokenizer.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text("utf-8")
    elif (path / "chat_template.json").is_file():
        template = read_json(path / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default") or next(iter(named.values()), None)
    return {keys.CHAT_TEMPLATE: template} if isinstance(template, str) else {}
