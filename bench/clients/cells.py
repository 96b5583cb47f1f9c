"""What each client is tried with, and how a trial is reported: one JSON line with what came of every cell."""

import json
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib import metadata
from typing import Any

QUESTION = 'Define the noun "river".'
N_TOKENS = 12
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
"""The arguments of the tool `weather`, and the form of answers held to a schema."""
LONG = "river " * 4000
"""More than the demo model's context window holds."""


class FailedError(AssertionError):
    """The client did not get what it should."""


def expect(is_true: object, found: object) -> None:
    """Raises FailedError with what was `found` in the place of what is expected."""
    if not is_true:
        raise FailedError(f"found {str(found)[:200]}")


def check_weather(arguments: object) -> None:
    """Raises FailedError for arguments, as an object or JSON, that do not follow the schema `WEATHER`."""
    given: Any = json.loads(arguments) if isinstance(arguments, str) else arguments
    is_right = isinstance(given, dict) and set(given) == {"city", "days"} and given["city"] in ("Paris", "Rome")
    expect(is_right and 1 <= given["days"] <= 9, given)


def expect_idle(url: str, seconds: float = 5.0) -> None:
    """Raises FailedError unless the server stops working on requests within `seconds`."""
    end = time.monotonic() + seconds
    while True:
        with urllib.request.urlopen(f"{url}/metrics") as response:
            lines = response.read().decode().splitlines()
        running = next(line for line in lines if line.startswith("slimoe_num_requests_running"))
        if float(running.split()[-1]) == 0:
            return
        expect(time.monotonic() < end, running)
        time.sleep(0.05)


def report(package: str, *cells: Callable[[], None]) -> None:
    """Runs the cells in turn and prints what came of each by its name: "works", or the error in one line."""
    found = {}
    for cell in cells:
        try:
            cell()
            found[cell.__name__] = "works"
        except Exception as error:
            found[cell.__name__] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(json.dumps({"client": package, "version": metadata.version(package), "cells": found}))
    sys.exit(any(outcome != "works" for outcome in found.values()))
