"""Times as people and clients write them, such as 90s, 10m or 1h30m."""

import re

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_PART = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)"
_DURATION = re.compile(rf"(?P<sign>[+-]?)(?:(?P<parts>(?:{_PART})+)|(?P<number>[0-9]{{1,9}}(?:\.[0-9]{{1,9}})?))")


def parse_duration(text: str) -> float | None:
    """Seconds, below 0 after a minus sign; a number without a unit is one of seconds. None for what is no time."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        return None
    parts = re.findall(_PART, found["parts"]) if found["parts"] else [(found["number"], "")]
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    return -seconds if found["sign"] == "-" else seconds


def parse_minutes(text: str) -> float | None:
    """Seconds as `parse_duration` reads them, but a number without a unit is one of minutes."""
    seconds = parse_duration(text)
    return seconds if seconds is None or text.strip()[-1:].isalpha() else 60 * seconds
