"""Sizes in bytes as people write them: 8GiB, 500MB, 4096."""

import re
from decimal import Decimal

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*((?:[kmgt]i?)?b?)", re.IGNORECASE)
_LETTERS = "KMGT"


def parse_bytes(text: str) -> int | None:
    """The bytes that a person wrote; None for what is no size.

    Units are KiB, MiB, GiB and TiB or just K, M, G and T for powers of 1024, KB, MB, GB and TB for powers of 1000, B or
    none for bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    unit = match[2].upper()
    step = 1000 if len(unit) == 2 and unit.endswith("B") else 1024
    power = _LETTERS.index(unit[0]) + 1 if unit[:1] in tuple(_LETTERS) else 0
    return int(Decimal(match[1]) * step**power)


def bytes_text(n_bytes: int) -> str:
    """The same bytes for `parse_bytes`, in the largest unit that they are a whole number of."""
    for power in range(len(_LETTERS), 0, -1):
        if n_bytes and n_bytes % 1024**power == 0:
            return f"{n_bytes // 1024**power}{_LETTERS[power - 1]}iB"
    return str(n_bytes)
