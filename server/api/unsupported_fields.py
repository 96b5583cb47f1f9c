"""Fields that clients send and this server does not support, in one table.

A field that constrains the answer, changes the prompt or asks for something in the answer is refused: an answer that
only looks as if it followed the field would be worse than none. A field that merely changes the probabilities of
sampling is ignored, as other servers do, and the log says so once. Fields that are not in this table do no harm.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from slimoe.server.api_error import unsupported

_log = logging.getLogger(__name__)
_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
_LONGEST_NEUTRAL = 64
T = TypeVar("T", bound=msgspec.Struct)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why a field is refused, and the values with which it asks for nothing."""

    reason: str
    neutral: tuple[Any, ...] = _NOTHING


def _all(names: str, value: V) -> dict[str, V]:
    return dict.fromkeys(names.split(), value)


_FORM = Unsupported("The form of an answer is given by response_format, json_schema, grammar or guided_json.")
_FORM_WITHIN = Unsupported(_FORM.reason, (*_NOTHING, {"format": None}, {"format": {"type": "text"}}))
_THOUGHT = Unsupported("This server cannot limit reasoning by itself. reasoning_effort none does without.", (None, -1))
_LIMIT = Unsupported("The limit of an answer is called max_tokens.")
_LEAST = Unsupported("This server cannot hold an answer to a least length. ignore_eos goes on to max_tokens.")
_TIME = Unsupported("This server has no limit of time. Use max_tokens, or close the connection.")
_STOP = Unsupported("What ends an answer is given as text in stop.")
_TOKENS = Unsupported("Tokens are allowed and forbidden by logit_bias alone.")
_BEAM = Unsupported("This server samples one token after the other, without beams.", (*_NOTHING, 1))
_PROMPT = Unsupported("This server does not put it into the prompt. Write it into the messages.")
_TEXT = Unsupported("This server reads and writes text only.")
_LORA = Unsupported("This server loads no adapters.")
_SCORES = Unsupported(
    "This server gives scores by logprobs alone, and a prompt's by echo with logprobs in /v1/completions."
)
_TOOLS = Unsupported("This server does not call tools. Leave the field out.", (*_NOTHING, "none", "auto"))
_OPTIONS = Unsupported("What it holds is not read. Send each as a field of its own, such as max_tokens or temperature.")

COMMON: Mapping[str, Unsupported] = {
    **_all("grammar_string grammar_lazy grammar_triggers regex_pattern structural_tag", _FORM),
    **_all("guided_structural_tag guided_whitespace_pattern guided_decoding", _FORM),
    **_all("format output_format response_schema response_mime_type structured_output json_mode", _FORM),
    **_all("constraints guidance guided_options_request", _FORM),
    **_all("text output_config", _FORM_WITHIN),
    **_all("thinking_budget_tokens thinking_budget thinking_token_budget", _THOUGHT),
    **_all("reasoning_budget reasoning_budget_tokens", _THOUGHT),
    **_all("max_new_tokens max_output_tokens max_tokens_to_sample max_length num_predict", _LIMIT),
    **_all("min_tokens min_new_tokens min_length n_indent", _LEAST),
    **_all("t_max_predict_ms t_max_prompt_ms max_time", _TIME),
    **_all("stop_token_ids stop_sequences stop_sequence stop_strings stop_words stop_regex", _STOP),
    **_all("stopping_strings custom_stopping_strings include_stop_str_in_output no_stop_trim", _STOP),
    **_all("bad_words bad_words_ids banned_tokens banned_strings custom_token_bans ban_eos_token", _TOKENS),
    **_all("allowed_token_ids allowed_words force_words_ids suppress_tokens begin_suppress_tokens", _TOKENS),
    **_all("logits_processors custom_logit_processor sequence_bias no_repeat_ngram_size forced_eos_token_id", _TOKENS),
    **_all("use_beam_search num_beams", _BEAM),
    **_all("documents system instructions chat_template negative_prompt template", _PROMPT),
    "truncate_prompt_tokens": Unsupported("This server never cuts a prompt off."),
    **_all("prompt_embeds input_embeds images image_data audio_data video_data multi_modal_data audio", _TEXT),
    "modalities": Unsupported(_TEXT.reason, (*_NOTHING, ["text"])),
    "web_search_options": Unsupported("This server has no access to the web.", (None, False)),
    **_all("lora lora_path lora_adapter lora_request", _LORA),
    **_all("n_probs post_sampling_probs return_tokens_as_token_ids return_token_ids return_logprob", _SCORES),
    "prompt_logprobs": Unsupported(_SCORES.reason, (None, False)),
    "skip_special_tokens": Unsupported("Control tokens are never part of an answer.", (None, True)),
    **_all("options extra_body parameters sampling_params generation_config generationConfig nvext", _OPTIONS),
}
CHAT: Mapping[str, Unsupported] = {
    **COMMON,
    "best_of": _BEAM,
    "echo": Unsupported("A chat does not give its prompt back. /v1/completions does."),
    "add_special_tokens": Unsupported("The model's chat template decides on special tokens.", (None, False)),
}
NO_TOOLS: Mapping[str, Unsupported] = _all("tools tool_choice functions function_call", _TOOLS)
"""Of endpoints that continue a text."""
COMPLETION: Mapping[str, Unsupported] = {
    **COMMON,
    **NO_TOOLS,
    "top_logprobs": Unsupported("The likeliest tokens are asked for by logprobs, which is a number here."),
    "add_special_tokens": Unsupported(
        "A text begins with the model's own token. Send token ids to leave it out.", (None, True)
    ),
}
SAMPLERS: Mapping[str, tuple[Any, ...]] = {
    **_all("typical_p typical tfs_z tfs guidance_scale cfg_scale encoder_repetition_penalty", (1,)),
    **_all("mirostat mirostat_mode dry_multiplier xtc_probability dynatemp_range top_a", ()),
    **_all("epsilon_cutoff eta_cutoff smoothing_factor penalty_alpha dynamic_temperature", ()),
    **_all("samplers sampler_order sampler_priority temperature_last length_penalty", (1,)),
    **_all("top_n_sigma nsigma adaptive_target", (-1,)),
}
"""Fields that choose another way of sampling, with the values, besides empty ones, that switch it off."""


class UnsupportedFields:
    """Finds unsupported fields in bodies; remembers which ones the log has been told of."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def refuse(self, body: msgspec.Struct, table: Mapping[str, Unsupported]) -> None:
        """Raises ApiError for a field of `table` that asks for something; `body` is `extended` by it."""
        for name, field in table.items():
            if not _is_one_of(getattr(body, name), field.neutral):
                raise unsupported(f"The field {name} is not supported. {field.reason}", name)
        for name, neutral in SAMPLERS.items():
            if name not in self._told and not _is_one_of(getattr(body, name), (*_NOTHING, *neutral)):
                self._told.add(name)
                _log.warning("A client sets %s, which this server does not sample by.", name)


def extended(kind: type[T], table: Mapping[str, Unsupported]) -> type[T]:
    """`kind` with the fields of the table as they were sent, not decoded: what nobody reads may have any type."""
    absent = msgspec.Raw(b"null")
    fields = [(name, msgspec.Raw, absent) for name in (*table, *SAMPLERS)]
    made: type[T] = msgspec.defstruct(kind.__name__, fields, bases=(kind,), kw_only=True)  # type: ignore[assignment]
    return made


def _is_one_of(raw: msgspec.Raw, values: tuple[Any, ...]) -> bool:
    data = bytes(raw)
    if len(data) > _LONGEST_NEUTRAL:
        return False
    try:
        given = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # No UTF-8, or a number that is too large: what nobody reads was not looked at before.
        return False
    # To Python, true is 1.
    return any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in values)
