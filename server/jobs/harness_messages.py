"""What `slimoe eval` and the process that runs lm-eval tell each other, one JSON document a line."""

from typing import Any

import msgspec

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable of the process in which it finds the server's key, where lm-eval looks for one."""


class HarnessRequest(msgspec.Struct, frozen=True):
    """What is to be evaluated: names of tasks or YAML files, with `n_parallel` requests at once.

    With `chat` prompts are conversations in the model's template; with `keeps_samples` the result holds every question;
    with `only_plans` nothing is asked but what it would cost.
    """

    tasks: tuple[str, ...]
    n_parallel: int = 1
    limit: int | None = None
    n_fewshot: int | None = None
    seed: int = 1234
    chat: bool = False
    keeps_samples: bool = False
    only_plans: bool = False


class HarnessServer(msgspec.Struct, frozen=True):
    """Told when the tasks are loaded: the server that answers at `url` and its model, with `n_ctx` tokens."""

    url: str
    model: str
    n_ctx: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """First event: the tasks and their data are there, and a server can be opened for them."""

    tasks: list[str]


class Planned(msgspec.Struct, frozen=True, tag=True):
    """Next: the requests of each task, and the tokens of all; `seconds` is what a try of them makes of that.

    `n_read` tokens are prompts', counted on a sample, and at most `n_written` are answers'.
    """

    requests: dict[str, int]
    n_read: int
    n_written: int
    seconds: float


class Answered(msgspec.Struct, frozen=True, tag=True):
    """So many requests of all are answered."""

    n_done: int
    n_total: int


class Evaluated(msgspec.Struct, frozen=True, tag=True):
    """Last event: lm-eval's result, the versions of what made it, and the sums of the server's timings."""

    result: dict[str, Any]
    versions: dict[str, str]
    timings: dict[str, float]


class HarnessFailed(msgspec.Struct, frozen=True, tag=True):
    """Last event instead: why there is no result, as a sentence for a person; `is_usage` if they asked for too much."""

    message: str
    is_usage: bool = False


HarnessEvent = Loaded | Planned | Answered | Evaluated | HarnessFailed
