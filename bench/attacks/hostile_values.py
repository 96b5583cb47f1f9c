"""Values that readers of JSON trip over: wrong types, extremes of numbers, sizes, depths and characters."""

import json
import random
from collections.abc import Iterator
from typing import Any

MANY = 5000

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 65536, 2**31 - 1, 2**31, 2**32, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**30, 0.5, -0.5, 1e-9, 1e-310, 1e10, 1e38, 1e300, -1e300, -0.0, 1.5),
)
"""As JSON writes them."""
UNSPEAKABLE = ("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "0x10", "01", "1.", "1e", "+1", "1_000", "9" * 5000)
"""Written like numbers, and none that JSON or a double knows."""
TEXTS = (
    *("", " ", "x", "0", "-1", "1e9", "true", "null", "None", "[]", "{}", "\n", "\r\n\x1b[31mred", "\x00", "\x7f\x9b"),
    *(
        "\ud800",
        "\udfff\ud800",
        "\u202e\u2066",
        "\ufeff",
        "\ufffe",
        "e" + "\u0301" * 500,
        "👨‍👩‍👧‍👦" * 20,
        "𝕳" * 50,
        "ﷺ" * 100,
    ),
    *("<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "{{ 7*7 }}", "{% for %}", "%s%n%d", "../../etc/passwd", "a" * 3000),
    *("▁" * 40, "🏳️‍🌈", "İ", "ß", "\u2028", "\u00a0", "constructor", "__proto__", "__class__"),
)


def value(rng: random.Random, depth: int = 3) -> Any:
    """A value at random, a scalar more often than not; `depth` is how deep lists and objects may nest."""
    kind = rng.randrange(12 if depth else 8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    if kind < 8:
        return rng.choice((None, True, False))
    if kind == 8:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 9:
        return {str(rng.choice(TEXTS)): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    if kind == 10:
        return [rng.choice((0, "a", None, [], 1.5))] * rng.choice((1, 17, 65, MANY))
    return nested(rng, rng.choice((2, 30, 200)))


def nested(rng: random.Random, depth: int) -> Any:
    """Lists in lists, or objects in objects, `depth` of them."""
    inner: Any = rng.choice((0, "x", None))
    is_list = rng.random() < 0.5
    for _ in range(depth):
        inner = [inner] if is_list else {"a": inner}
    return inner


def paths(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys and places that lead to every value in a document; the document's own path is empty."""
    yield here
    if isinstance(document, dict):
        for key, inner in document.items():
            yield from paths(inner, (*here, key))
    elif isinstance(document, list):
        for n, inner in enumerate(document):
            yield from paths(inner, (*here, n))


def changed(document: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of the document with a `new` value at the path."""
    if not path:
        return new
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = changed(document[path[0]], path[1:], new)
    return copy


def without(document: Any, path: tuple[Any, ...]) -> Any:
    """A copy of the document without the value at the path; the document itself where the path is empty."""
    if not path:
        return document
    copy = dict(document) if isinstance(document, dict) else list(document)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(document[path[0]], path[1:])
    return copy


def dumps(document: Any, rng: random.Random) -> bytes:
    """JSON as clients write it, in one style or another; lone surrogates are escaped."""
    is_plain = rng.random() < 0.5
    separators = rng.choice((None, (",", ":")))
    text = json.dumps(document, ensure_ascii=is_plain, separators=separators)
    return text.encode("utf-8", "backslashreplace")
