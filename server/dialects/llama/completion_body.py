"""The body of llama-server's `/completion`, and what its prompts and biases are made of."""

from collections.abc import Sequence
from typing import Any

from slimoe.server.api.request_body import MAX_BIASES, MAX_PROMPTS, Choices, GenerationBody, LogprobCount, decoded
from slimoe.server.api.unsupported_fields import COMMON, NO_TOOLS, Unsupported, extended
from slimoe.server.api_error import ApiError, invalid, unsupported

MAX_TEXTS = 256
"""Texts among a prompt's ids or a bias's tokens, each of which is tokenized by itself."""
Part = int | str
_FORMS = "A prompt is a text, token ids, both mixed, or a list of these."
_BIAS_FORMS = "logit_bias is a list of [token or text, bias], or maps tokens or texts to biases."


class LlamaCompletionBody(GenerationBody, kw_only=True):
    """`POST /completion`; `prompt` is a text, token ids, both mixed, `{"prompt_string": text}`, or a list of these."""

    prompt: str | list[Any] | dict[str, Any]
    n_probs: LogprobCount | None = None
    n_cmpl: Choices | None = None
    cache_prompt: bool | None = None
    return_tokens: bool | None = None
    response_fields: list[str] | None = None


_OWN = frozenset(LlamaCompletionBody.__struct_fields__)
LLAMA: dict[str, Unsupported] = {name: field for name, field in COMMON.items() if name not in _OWN} | {
    **NO_TOOLS,
    "t_max_predict_ms": Unsupported(COMMON["t_max_predict_ms"].reason, (None, 0, -1)),
    "post_sampling_probs": Unsupported("n_probs tells the model's own probabilities, before sampling changes them."),
    "backend_sampling": Unsupported("This server samples in one place.", (None, False, True)),
}
LlamaCompletionRequest = extended(LlamaCompletionBody, LLAMA)


def prompts_of(prompt: str | list[Any] | dict[str, Any]) -> list[str | list[Part]]:
    """The prompts of a body: texts, and lists of ids and texts; raises ApiError."""
    if isinstance(prompt, list) and prompt and not _is_one(prompt):
        if len(prompt) > MAX_PROMPTS:
            raise invalid(f"{len(prompt)} prompts are too many: {MAX_PROMPTS} are allowed.", "prompt")
        return [_prompt(element, f"prompt[{n}]") for n, element in enumerate(prompt)]
    return [_prompt(prompt, "prompt")]


def _is_one(elements: list[Any]) -> bool:
    """Whether a list is one prompt, of ids or of ids and texts."""
    return any(type(element) is int for element in elements)


def _prompt(element: Any, param: str) -> str | list[Part]:
    if isinstance(element, dict):
        if element.get("multimodal_data"):
            raise unsupported("This server reads text only.", f"{param}.multimodal_data")
        element = element.get("prompt_string")
    if isinstance(element, str):
        return element
    if not isinstance(element, list):
        raise invalid(_FORMS, param)
    if not element:
        raise invalid("The prompt is empty. Give a text or token ids.", param)
    for part in element:
        if not isinstance(part, str) and (type(part) is not int or not 0 <= part < 2**31):
            raise invalid(f"{_FORMS} {part!r:.100} is no token id.", param)
    check_texts([part for part in element if isinstance(part, str)], param)
    return element


def biases_of(data: bytes) -> list[tuple[Part, float | bool]]:
    """The biases by token or text, in whichever of the four forms; raises ApiError."""
    if not data.lstrip().startswith(b"["):
        given: Any = decoded(data, Any, "logit_bias")
        if given is None:
            return []
        if not isinstance(given, dict):
            raise _bad_bias("")
        # Python reads no number of thousands of digits, and one of twenty is no token id either.
        pairs: list[Any] = [[int(key[:20]) if key.isascii() and key.isdigit() else key, v] for key, v in given.items()]
    else:
        pairs = decoded(data, list[Any], "logit_bias")
    if len(pairs) > MAX_BIASES:
        raise invalid(f"logit_bias may name at most {MAX_BIASES:,} tokens.", "logit_bias")
    found: list[tuple[Part, float | bool]] = []
    for n, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (int, str):
            raise _bad_bias(f"[{n}]")
        if pair[1] is not False and type(pair[1]) not in (int, float):
            raise _bad_bias(f"[{n}]", "A bias is a number, or false to forbid the token.")
        found.append((pair[0], pair[1]))
    check_texts([part for part, _ in found if isinstance(part, str)], "logit_bias")
    return found


def check_texts(texts: Sequence[str], param: str) -> None:
    """Raises ApiError for more texts than are tokenized for one field."""
    if len(texts) > MAX_TEXTS:
        raise invalid(f"{len(texts)} texts are too many: {MAX_TEXTS} are allowed, and token ids besides.", param)


def _bad_bias(where: str, problem: str = _BIAS_FORMS) -> ApiError:
    return invalid(problem, f"logit_bias{where}")
