"""A checkpoint's tokenizer and chat template, for texts that the converter measures on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.chat.chat import Chat
from slimoe.server.messages import ChatPrompt, Turn


class TokenizerEncoder:
    """The `TextEncoder` of a model whose metadata has GGUF's tokenizer keys; `close` frees libllama's vocabulary."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Raises ModelFileError or UnsupportedModelError for a tokenizer that is absent, damaged or unknown."""
        self._tokenizer = Tokenizer.of_metadata(path, metadata)
        self._chat = Chat(self._tokenizer)

    def text(self, text: str, *, at_start: bool) -> list[int]:
        """The ids of a text, after a BOS at its start if the model is used to one."""
        return self._tokenizer.encode(text, add_bos=at_start and self._tokenizer.add_bos)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a whole conversation; raises ChatTemplateError."""
        turns = tuple(Turn(message["role"], message["content"]) for message in messages)
        return list(self._chat.prompt(ChatPrompt(turns), generate=False).ids)

    def close(self) -> None:
        """Frees the vocabulary, and ends the process that the template runs in."""
        self._chat.close()
        self._tokenizer.close()
