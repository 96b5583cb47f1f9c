"""The keys of recipe files: one row per key, with the function that checks and reads its value."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slimoe.converter.methods.scores import SCORES
from slimoe.converter.quant.mixes import RECIPES
from slimoe.converter.stats.type_costs import CANDIDATES
from slimoe.offload.resources.duration import parse_minutes
from slimoe.offload.resources.memory import parse_bytes

_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*%")
_LARGE_TYPES = ("F16", "BF16", "F32")
_MOST_BITS = 64
_MOST_BYTES = 1 << 62
TYPES = tuple(dict.fromkeys((*CANDIDATES, *_LARGE_TYPES)))
"""The names of the types in which a matrix may be stored."""


class NotExpectedError(Exception):
    """A value is not one that its key allows; the message says what the key allows."""


@dataclass(frozen=True, slots=True)
class SourceSizes:
    """The sizes of a model to which a recipe's numbers and percentages refer.

    They are its layers, the experts of a layer, the neurons of an expert, and the experts that a token selects, 0 where
    that is not known.
    """

    n_layer: int
    n_expert: int
    n_ff: int
    n_expert_used: int = 0


Read = Callable[[object, SourceSizes], object]
"""Turns a TOML value into the recipe's; raises NotExpectedError."""


def read_amount(value: object, whole: int, least: int, noun: str) -> int:
    """Reads a number from `least` to `whole`, or a percentage of `whole` such as "25%", rounded.

    `noun` is what is counted. Raises NotExpectedError.
    """
    percent = _PERCENT.fullmatch(value.strip()) if isinstance(value, str) else None
    if percent is not None and float(percent[1]) <= 100:
        value = round(whole * float(percent[1]) / 100)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= whole:
        raise NotExpectedError(f'a number of {noun} from {least} to {whole}, or a percentage such as "25%"')
    return value


def _layers(value: object, sizes: SourceSizes) -> int:
    return read_amount(value, sizes.n_layer, 0, "layers")


def _experts(value: object, sizes: SourceSizes) -> int:
    if not sizes.n_expert:
        raise NotExpectedError("left out, as the model has no experts")
    return read_amount(value, sizes.n_expert, 1, "experts")


def _neurons(value: object, sizes: SourceSizes) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= sizes.n_ff:
        raise NotExpectedError(f"a number of neurons from 1 to the {sizes.n_ff} of the model's experts")
    return value


def _main(value: object, sizes: SourceSizes) -> int:
    if not sizes.n_expert:
        raise NotExpectedError("left out, as the model has no experts")
    if sizes.n_expert_used == 1:
        raise NotExpectedError("left out, as a token selects one expert of the model, which leaves none to stand for")
    most = (sizes.n_expert_used or sizes.n_expert + 1) - 1
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise NotExpectedError(f"a number of experts from 1 to {most}, fewer than a token selects")
    return value


def _bits(value: object, _sizes: SourceSizes) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= _MOST_BITS:
        raise NotExpectedError(f"a number of bits up to {_MOST_BITS}, such as 2.5")
    return float(value)


def _size(value: object, _sizes: SourceSizes) -> int:
    size = parse_bytes(value) if isinstance(value, str) else value
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= _MOST_BYTES:
        raise NotExpectedError('a size such as "12GiB" or "500MB"')
    return size


def _time(value: object, _sizes: SourceSizes) -> float:
    is_time = isinstance(value, str | int | float) and not isinstance(value, bool)
    seconds = parse_minutes(str(value)) if is_time else None
    if seconds is None or seconds <= 0:
        raise NotExpectedError('a time such as "5m", "90s" or "1h30m", or a number of minutes')
    return seconds


def _flag_or_time(value: object, sizes: SourceSizes) -> bool | float:
    try:
        return value if isinstance(value, bool) else _time(value, sizes)
    except NotExpectedError as error:
        raise NotExpectedError(f"true, false or {error}") from None


def _flag(value: object, _sizes: SourceSizes) -> bool:
    if not isinstance(value, bool):
        raise NotExpectedError("true or false")
    return value


def _text(value: object, _sizes: SourceSizes) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise NotExpectedError("a text of one line")
    return value


def _word(*words: str) -> Read:
    def read(value: object, _sizes: SourceSizes) -> str:
        if not isinstance(value, str) or value not in words:
            raise NotExpectedError(f"one of {', '.join(words)}")
        return value

    return read


def _type(*names: str) -> Read:
    def read(value: object, _sizes: SourceSizes) -> str:
        if not isinstance(value, str) or value.upper() not in names:
            raise NotExpectedError(f"a type: one of {', '.join(names)}")
        return value.upper()

    return read


def _types(value: object, sizes: SourceSizes) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise NotExpectedError('a list of types, such as ["Q2_K", "Q3_K"]')
    return tuple(str(_type(*CANDIDATES)(one, sizes)) for one in value)


TOP: Mapping[str, Read] = {
    "name": _text,
    "format": _word("native", "stock"),
    "target_size": _size,
    "target_bpw": _bits,
    "drop_ffn": _layers,
    "drop_attention": _layers,
    "drop_blocks": _layers,
    "free_constants": _flag,
    "free_layers": _flag,
    "hints": _flag,
    "search": _time,
    "specialise": _text,
}
SECTIONS: Mapping[str, Mapping[str, Read]] = {
    "experts": {
        "keep": _experts,
        "score": _word("subset", *SCORES),
        "overall": _flag,
        "replacement": _word("nothing", "constant"),
        "merge": _word("m-smoe", "hc-smoe", "neurons"),
        "width": _neurons,
        "order": _word("router", "co-selection"),
        "main": _main,
    },
    "types": {
        "expert": _type(*dict.fromkeys((*TYPES, *RECIPES))),
        "low": _type(*CANDIDATES),
        "attention": _type(*TYPES),
        "token": _type(*TYPES),
        "output": _type(*TYPES),
        "candidates": _types,
    },
    "fit": {"importance": _flag, "feedback": _flag_or_time, "refit": _flag, "heal": _time},
}
