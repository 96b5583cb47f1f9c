"""A stand-in for lm-eval's process: it asks the server for what lm-eval asks, and answers as its tasks' names say.

`absent` cannot be loaded, `fails` fails in the middle, `crashes` just ends, and `forever` asks until it is killed, and
`writes` has a text written as well.
"""

import os
import sys
import time
from collections import Counter

import msgspec

from slimoe.server.jobs.harness_messages import (
    KEY_VARIABLE,
    Answered,
    Evaluated,
    HarnessFailed,
    HarnessRequest,
    HarnessServer,
    Loaded,
    Planned,
)
from slimoe.server.jobs.remote_tokens import RemoteTokens, counted_timings
from slimoe.server.process.child_life import settle_in


def send(event: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.flush()


def main() -> None:
    settle_in(int(sys.argv[1]))
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=HarnessRequest)
    if "absent" in request.tasks:
        send(HarnessFailed("The data of absent cannot be read.", is_usage=True))
        return
    send(Loaded(list(request.tasks)))
    server = msgspec.json.decode(sys.stdin.buffer.readline(), type=HarnessServer)
    tokens = RemoteTokens(server.url, os.environ[KEY_VARIABLE])
    ids = tokens.encode("the quick brown fox", begins=True)
    send(Planned(dict.fromkeys(request.tasks, 2), 2 * len(ids), 0, 1.5))
    if request.only_plans:
        return
    if "fails" in request.tasks:
        send(HarnessFailed("lm-eval ended with ZeroDivisionError: division by zero"))
        return
    if "crashes" in request.tasks:
        print("the last words", file=sys.stderr)
        sys.exit(3)
    body = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": request.seed}
    scores: list[list[float | None]] = []
    while not scores or "forever" in request.tasks:
        answer = tokens.post("/v1/completions", body)
        scores.append(answer["choices"][0]["logprobs"]["token_logprobs"])
        send(Answered(len(scores), 2))
        time.sleep(0.01)
    figures = {
        "alias": "one",
        "logprob,none": sum(score or 0.0 for score in scores[0][1:-1]),
        "logprob_stderr,none": 0.25,
    }
    timings = Counter(counted_timings(answer, writes=False))
    if "writes" in request.tasks:
        writing = {"prompt": ids, "max_tokens": 9, "ignore_eos": True, "temperature": 0}
        timings.update(counted_timings(tokens.post("/v1/completions", writing), writes=True))
    send(
        Evaluated(
            {"results": dict.fromkeys(request.tasks, figures)},
            {"lm_eval": "0.0"},
            {name: float(value) for name, value in timings.items()},
        )
    )


if __name__ == "__main__":
    main()
