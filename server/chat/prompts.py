"""What a client sent, made into a request the engine can read: token ids, checked against the open model."""

import dataclasses
from typing import NamedTuple

from slimoe.offload.errors import ContextOverflowError, SlimoeError
from slimoe.offload.text.generation import GenerationRequest
from slimoe.offload.text.grammars import Grammars
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.chat.chat import Chat, Prompt
from slimoe.server.chat.template_child import MAX_OUTPUT
from slimoe.server.chat.template_error import ChatTemplateError
from slimoe.server.formats.families import is_marked
from slimoe.server.messages import PLAIN_READING, ChatPrompt, PromptSource, Reading, TextPrompt, TokenPrompt

_LEAST_OUTPUT, _LEAST_TOLD = 1 << 16, 1 << 16
_LONGEST = 16
"""Bytes of a token where its vocabulary does not tell."""


class RequestError(SlimoeError):
    """A request that this model cannot carry out; `param` names the field at fault."""

    exit_code = 2

    def __init__(self, param: str, message: str) -> None:
        self.param = param
        super().__init__(message)


class BusyError(SlimoeError):
    """What came before a request took so long that it would have waited too long."""


class Prepared(NamedTuple):
    """A request that the engine can carry out, and how its answer is to be read."""

    request: GenerationRequest
    reading: Reading = PLAIN_READING


class Prompts:
    """Turns prompts of every form into token ids for one open model."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        n_vocab: int,
        n_ctx: int,
        grammars: Grammars | None = None,
        thinks: bool | None = None,
    ) -> None:
        """`thinks` says whether answers begin with reasoning where a request does not."""
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._n_vocab = n_vocab
        self._n_ctx = n_ctx
        self._longest = None if tokenizer is None else tokenizer.longest
        # Twice as much as fits leaves room for what templates drop and add.
        max_output = MAX_OUTPUT if self._longest is None else 2 * n_ctx * self._longest + _LEAST_OUTPUT
        self._chat = None if tokenizer is None else Chat(tokenizer, max_output, thinks=thinks)

    def complete(self, request: GenerationRequest, source: PromptSource) -> GenerationRequest:
        """What is to be generated for who takes an answer as it is written.

        Raises what `prepare` and `check_form` raise.
        """
        prepared = self.prepare(request, source).request
        self.check_form(prepared)
        return dataclasses.replace(prepared, shows_control=False)

    def prepare(self, request: GenerationRequest, source: PromptSource) -> Prepared:
        """`request` with the ids of `source` and its stop strings, and how the answer is to be read.

        The answer's form is not looked at: `check_form` does that. Raises RequestError, ChatTemplateError, or
        ContextOverflowError when no room for an answer would be left.
        """
        prompt = self.prompt(source)
        # A first space belongs to a new message's token, and to the text of a message that is continued.
        begins_answer = isinstance(source, ChatPrompt) and source.messages[-1].role != "assistant"
        constraint = request.constraint
        if isinstance(source, ChatPrompt) and prompt.grammar is not None:
            constraint = prompt.grammar.constraint(source, constraint)
        if constraint is not None and self._grammars is None:
            raise RequestError(constraint.param, "This model has no tokenizer, so answers can have no form.")
        n_prompt = len(prompt.ids)
        n_room = self._n_ctx - n_prompt
        if n_room < (0 if request.max_tokens == 0 else 1):
            raise ContextOverflowError(n_prompt, self._n_ctx)
        if any(not 0 <= token < self._n_vocab for token in request.sampling.logit_bias):
            raise RequestError(
                "logit_bias", f"logit_bias names a token that is not one of the model's {self._n_vocab}."
            )
        if request.sampling.forbids_all(self._n_vocab):
            raise RequestError(
                "logit_bias", f"logit_bias forbids all of the model's {self._n_vocab} tokens. Leave some of them out."
            )
        stop = tuple(dict.fromkeys((*request.stop, *prompt.stop)))
        shows_control = request.shows_control or is_marked(prompt.reading)
        prepared = dataclasses.replace(
            request,
            prompt_ids=prompt.ids,
            stop=stop,
            strips_space=begins_answer,
            constraint=constraint,
            shows_control=shows_control,
        )
        return Prepared(prepared, prompt.reading)

    def check_form(self, request: GenerationRequest) -> None:
        """Raises ConstraintError when answers to a prepared request cannot be held to its form; may take a second."""
        if request.constraint is not None and self._grammars is not None:
            self._grammars.check(request.constraint, strips_space=request.strips_space)

    def prompt(self, source: PromptSource) -> Prompt:
        """The ids of `source`; raises RequestError, ChatTemplateError, and ContextOverflowError before a long work."""
        if isinstance(source, TokenPrompt):
            if not source.ids:
                raise RequestError("prompt", "The prompt is empty. Give at least one token.")
            wrong = next((token for token in source.ids if not 0 <= token < self._n_vocab), None)
            if wrong is not None:
                raise RequestError("prompt", f"Token {wrong} is not one of the model's {self._n_vocab}.")
            return Prompt(source.ids)
        if isinstance(source, TextPrompt):
            self._check_length(source.text)
            return Prompt(tuple(self.encode(source.text)))
        self._check_length(*(turn.content for turn in source.messages))
        return self.chat.prompt(source)

    def encode(self, text: str) -> list[int]:
        """The ids of raw text as the model expects it: with its BOS, once; control tokens may be written out."""
        tokenizer = self.tokenizer
        ids = tokenizer.encode(text, parse_special=True)
        if tokenizer.add_bos and tokenizer.bos is not None and ids[:1] != [tokenizer.bos]:
            ids.insert(0, tokenizer.bos)
        if not ids:
            raise RequestError("prompt", "The prompt is empty. Give at least one token.")
        return ids

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises RequestError when it has none."""
        if self._tokenizer is None:
            raise RequestError("prompt", "This model has no tokenizer. Give the prompt as token ids.")
        return self._tokenizer

    @property
    def chat(self) -> Chat:
        """The model's chat format; raises RequestError when it has no tokenizer."""
        if self._chat is None:
            raise RequestError(
                "messages", "This model has no tokenizer, so it cannot chat. Complete token ids instead."
            )
        return self._chat

    def template_problem(self) -> str | None:
        """Why the model's template cannot be used, None if it can or there is none."""
        try:
            if self._chat is not None:
                self._chat.check()
        except ChatTemplateError as error:
            return str(error)
        return None

    def piece(self, token: int) -> bytes:
        """The bytes of `token`, control tokens by name; empty without a tokenizer."""
        return b"" if self._tokenizer is None else self._tokenizer.piece(token, special=True)

    def text_ids(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The ids of a text that need not fit the context window; raises RequestError when there are too many."""
        tokenizer, n_most = self.tokenizer, self.n_told
        if _n_bytes(text) <= n_most * (self._longest or _LONGEST):
            ids = tokenizer.encode(text, parse_special=parse_special)
            if len(ids) <= n_most:
                bos = [tokenizer.bos] if add_special and tokenizer.add_bos and tokenizer.bos is not None else []
                return bos + ids
        raise RequestError("prompt", f"The text has more than {n_most:,} tokens. Send it in parts.")

    @property
    def n_told(self) -> int:
        """The most tokens that one request may have encoded or decoded."""
        return max(self._n_ctx, _LEAST_TOLD)

    def _check_length(self, *texts: str) -> None:
        """Raises ContextOverflowError for texts that have too many tokens whatever these are."""
        n_bytes = sum(map(_n_bytes, texts))
        if self._longest is not None and n_bytes > self._n_ctx * self._longest:
            raise ContextOverflowError(-(-n_bytes // self._longest), self._n_ctx, at_least=True)


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
