"""What was measured of a machine, as lines for a person: each figure with its unit."""

from collections.abc import Callable, Mapping
from typing import Any

from slimoe.offload.resources.memory import human

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def measurement_lines(name: str, value: Any) -> list[str]:
    """The figures of a value that `slimoe.offload.machine.measurement_cache` remembers by that name.

    Curves are told by their ends; what no version of this program has measured is told as it is.
    """
    keys = frozenset(value) if isinstance(value, Mapping) else frozenset()
    tell = _TELLERS.get(keys)
    if tell is None:
        return [str(value)]
    try:
        return tell(name, value)
    except (ArithmeticError, LookupError, TypeError, ValueError):  # a file may hold anything
        return [str(value)]


def duration(seconds: float) -> str:
    """Seconds as a person reads them, with three digits."""
    unit, word = next(((unit, word) for unit, word in _UNITS if seconds >= unit), _UNITS[-1])
    return f"{seconds / unit:.3g} {word}"


def _curve(name: str, value: Any) -> list[str]:
    points = [*zip(value["n_rows"], value["seconds_per_byte"], strict=True)]
    ends = dict.fromkeys((points[0], points[-1]))
    return [", ".join(f"{1e-9 / seconds:.2f} GB/s of weights with {_rows(n)}" for n, seconds in ends)]


def _forms(name: str, value: Any) -> list[str]:
    lines = []
    for part, title in (("expert", "an expert's matrix"), ("dense", "any other matrix")):
        points = [*zip(*(value[part][key] for key in ("n_rows", "plain", "repacked")), strict=True)]
        ends = points if len(points) < 2 else [points[0], points[-1]]
        told = [
            f"with {_rows(n)} {duration(plain)} plain, {duration(repacked)} repacked" for n, plain, repacked in ends
        ]
        lines.append(f"{title}: {'; '.join(told)}")
    return lines


def _overheads(name: str, value: Any) -> list[str]:
    parts = {"graph": "a graph", "op": "each operation", "view": "each view"}
    return [", ".join(f"{title} {duration(value[f'{part}_seconds'])}" for part, title in parts.items())]


def _link(name: str, value: Any) -> list[str]:
    to, back = (f"{1e-9 * value[key]:.2f} GB/s" for key in ("to_device", "from_device"))
    return [f"{to} to the device, {back} back, a round trip {duration(value['round_trip'])}"]


def _number(name: str, value: Any) -> list[str]:
    if name.startswith("disk"):
        return [f"{1e-9 * value['value']:.2f} GB/s"]
    return [f"{duration(value['value'])} for a token, a layer and a token before it"]


def _driver(name: str, value: Any) -> list[str]:
    return [f"{human(value['opened'])} when it is opened, {human(value['kernels'])} for kernels"]


def _rows(n: int) -> str:
    return "1 row" if n == 1 else f"{n} rows"


_TELLERS: Mapping[frozenset[str], Callable[[str, Any], list[str]]] = {
    frozenset({"n_rows", "seconds_per_byte"}): _curve,
    frozenset({"expert", "dense"}): _forms,
    frozenset({"graph_seconds", "op_seconds", "view_seconds"}): _overheads,
    frozenset({"to_device", "from_device", "round_trip", "is_apart"}): _link,
    frozenset({"value"}): _number,
    frozenset({"opened", "kernels", "is_device_resident"}): _driver,
}
"""By the names of the fields of what was measured."""
