"""The small JSON files beside a tokenizer: tokens by role, added ones, ends of answers, the chat template."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from slimoe.converter.document import read_json
from slimoe.converter.gguf.bytes import all_bytes
from slimoe.converter.source.tokenizer.space_prefix import SpacePrefix
from slimoe.offload.errors import ModelFileError, UnsupportedModelError

ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""GGUF's names of the roles, and Hugging Face's."""
LLAMA_IDS = {"bos": 1, "eos": 2}
"""What the configuration classes of Llama, Mistral and Mixtral have where nothing names a token."""
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")

T = TypeVar("T", bound=msgspec.Struct)


class AddedToken(msgspec.Struct, frozen=True):
    """A token added after training: its text, and how it is looked for in texts."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None

    @property
    def is_normalized(self) -> bool:
        """Whether it is looked for in the normalised text; special ones are not unless that is said."""
        return not self.special if self.normalized is None else self.normalized


class _Named(msgspec.Struct):
    content: str


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


_Name = str | _Named | None
_Template = str | dict[str, str] | list[_NamedTemplate] | None
_TokenIds = int | list[int] | None


class _Roles(msgspec.Struct):
    bos_token: _Name = None
    eos_token: _Name = None
    unk_token: _Name = None
    pad_token: _Name = None
    eot_token: _Name = None
    eom_token: _Name = None

    def text(self, role: str) -> str | None:
        """The name of the token that has a role."""
        name = getattr(self, f"{role}_token")
        return name.content if isinstance(name, _Named) else name


class _TokenizerConfig(_Roles):
    tokenizer_class: str | None = None
    legacy: bool | None = None
    add_prefix_space: bool | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    split_special_tokens: bool | None = None
    added_tokens_decoder: dict[int, AddedToken] | None = None
    chat_template: _Template = None


class _TemplateFile(msgspec.Struct):
    chat_template: _Template = None


class _Config(msgspec.Struct):
    model_type: str | None = None
    bos_token_id: _TokenIds | msgspec.UnsetType = msgspec.UNSET
    eos_token_id: _TokenIds | msgspec.UnsetType = msgspec.UNSET
    unk_token_id: _TokenIds = None
    pad_token_id: _TokenIds | msgspec.UnsetType = msgspec.UNSET
    text_config: "_Config | None" = None  # the language model's, where that is a part of the whole

    def ids(self, role: str) -> list[int]:
        """The ids of the tokens that have a role."""
        ids: _TokenIds | msgspec.UnsetType = getattr(self, f"{role}_token_id")
        return ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """What the files say, as transformers understands them; each file may be missing.

    `texts` and `ids` are of tokens by role, and of the ends of answers: eos, eot, eom. `added` are tokens added after
    training, by id, `older_added` those of a file that says less of them. `is_llama_class`: the tokenizer's steps are
    those of transformers' own class for Llama, whatever tokenizer.json says.
    """

    texts: dict[str, str] = field(default_factory=dict)
    ids: dict[str, list[int]] = field(default_factory=dict)
    added: dict[int, AddedToken] = field(default_factory=dict)
    older_added: dict[int, AddedToken] = field(default_factory=dict)
    is_llama_class: bool = False
    legacy: bool | None = None
    add_prefix_space: bool = True
    add_bos: bool | None = None
    add_eos: bool | None = None
    chat_template: str | None = None

    @classmethod
    def read(cls, path: Path, class_ids: Mapping[str, int] = LLAMA_IDS) -> "TokenizerSettings":
        """Reads a checkpoint's directory. `class_ids` are the tokens of roles that no file names.

        Raises ModelFileError, and UnsupportedModelError for what a GGUF file cannot hold.
        """
        tokenizer = _optional(path / "tokenizer_config.json", _TokenizerConfig)
        names = _optional(path / "special_tokens_map.json", _Roles)
        configs = [_optional(path / name, _Config) for name in ("generation_config.json", "config.json")]
        configs.append(configs[1].text_config or _Config())
        if tokenizer.split_special_tokens:
            problem = "split_special_tokens takes special tokens apart, which a GGUF file cannot say."
            raise UnsupportedModelError(path / "tokenizer_config.json", problem)
        shorts = (*ROLES.values(), "eot", "eom")
        older_path = path / "added_tokens.json"
        older = read_json(older_path, dict[str, int]) if older_path.is_file() else {}
        texts = {role: tokenizer.text(role) or names.text(role) for role in shorts}
        ids = {role: [n for config in configs for n in config.ids(role)] for role in ROLES.values()}
        for role, number in class_ids.items():
            if all(getattr(config, f"{role}_token_id") is msgspec.UNSET for config in configs) and not texts[role]:
                ids[role] = [number]
        return cls(
            texts={role: text for role, text in texts.items() if text},
            ids={role: list(dict.fromkeys(numbers)) for role, numbers in ids.items()},
            added=tokenizer.added_tokens_decoder or {},
            # Of older tokenizers, without flags: those are special that have a role.
            older_added={
                token: AddedToken(text, text in texts.values(), normalized=False) for text, token in older.items()
            },
            is_llama_class=tokenizer.tokenizer_class in _LLAMA_CLASSES and configs[1].model_type == "llama",
            legacy=tokenizer.legacy,
            add_prefix_space=tokenizer.add_prefix_space is not False,
            add_bos=tokenizer.add_bos_token,
            add_eos=tokenizer.add_eos_token,
            chat_template=_chat_template(path, tokenizer.chat_template),
        )

    @property
    def llama_prefix(self) -> SpacePrefix:
        """The rule of transformers' class for Llama, which has one of its own."""
        return SpacePrefix(self.add_prefix_space, self.legacy is True, before_space=False)

    def role_id(self, role: str, ids: dict[str, int], n_vocab: int) -> int | None:
        """The token of a role, by its name or else by its number; `ids` are those of texts."""
        text = self.texts.get(role)
        if text in ids:
            return ids[text]
        return next(iter(_within(self.ids[role], n_vocab)), None)

    def end_ids(self, ids: dict[str, int], n_vocab: int) -> list[int]:
        """All tokens that end an answer, that of the tokenizer first."""
        named = [ids[text] for role in ("eos", "eot", "eom") if (text := self.texts.get(role)) in ids]
        return list(dict.fromkeys((*named, *_within(self.ids["eos"], n_vocab))))


def _within(ids: Iterable[int], n_vocab: int) -> list[int]:
    return [token for token in ids if 0 <= token < n_vocab]


def _optional(path: Path, kind: type[T]) -> T:
    return read_json(path, kind) if path.is_file() else kind()


def _chat_template(path: Path, template: _Template) -> str | None:
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        try:
            return all_bytes(jinja).decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise ModelFileError(jinja, "this is not readable as text.", "Download the checkpoint again.") from None
    if (path / "chat_template.json").is_file():
        template = read_json(path / "chat_template.json", _TemplateFile).chat_template
    if isinstance(template, list):
        template = {entry.name: entry.template for entry in template}
    if isinstance(template, dict):
        return template.get("default") or next(iter(template.values()), None)
    return template
