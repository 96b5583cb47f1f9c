"""The process that runs lm-eval for `slimoe eval`: `python -m slimoe.server.jobs.harness_child PARENT_PID`.

lm-eval is a client of the server like any other, but for its tokenizer: a sequence begins as the model wants it to.
"""

import logging
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import msgspec
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from slimoe.server.jobs.harness_messages import (
    KEY_VARIABLE,
    Answered,
    Evaluated,
    HarnessEvent,
    HarnessFailed,
    HarnessRequest,
    HarnessServer,
    Loaded,
    Planned,
)
from slimoe.server.jobs.remote_tokens import RemoteTokens, counted_timings
from slimoe.server.process.child_life import settle_in

_LONGEST_SECONDS = 7 * 24 * 3600
"""A request of a large model on a slow disk takes what it takes."""
_N_SAMPLED, _N_TRIED = 200, 3
_KEPT = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better", "configs", "samples")
_NEITHER = "is neither a task of lm-eval nor a YAML file"


class ServedModel(LocalCompletionsAPI):  # type: ignore[misc]
    """lm-eval's local-completions, which encodes sequences as the model wants them and counts what is answered."""

    def __init__(
        self, server: HarnessServer, request: HarnessRequest, key: str, on_answer: Callable[[int], None]
    ) -> None:
        super().__init__(
            base_url=f"{server.url}/v1/completions",
            model=server.model,
            tokenizer_backend="remote",
            auth_token=key,
            num_concurrent=request.n_parallel,
            max_length=server.n_ctx,
            seed=request.seed,
            timeout=_LONGEST_SECONDS,
            max_retries=1,
        )
        self.tokens = RemoteTokens(server.url, key)
        self.timings: Counter[str] = Counter()
        self._on_answer = on_answer
        self._begins = True

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.tokens.prefix

    def tok_encode(
        self,
        string: str | Sequence[str],
        left_truncate_len: int | None = None,
        add_special_tokens: bool | None = None,
        truncation: bool = False,
    ) -> list[Any]:
        """The ids of a text, or of several that are to be continued."""
        if not isinstance(string, str):
            return [self.tok_encode(one, left_truncate_len) for one in string]
        ids = self.tokens.encode(string, begins=self._begins and add_special_tokens is not False)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, whose first token follows BOS and which hold no other."""
        self._begins = False
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._begins = True
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a text."""
        return self.tokens.rendered(chat_history, begins_answer=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Nothing: the server has it."""
        return ""

    def parse_logprobs(self, outputs: Any, tokens: Any = None, ctxlens: Any = None) -> list[Any]:
        """The scores of an answer."""
        self._note(outputs, writes=False)
        return list(LocalCompletionsAPI.parse_logprobs(outputs, tokens, ctxlens))

    def parse_generations(self, outputs: Any, contexts: Any = None) -> list[Any]:
        """The texts of an answer."""
        self._note(outputs, writes=True)
        return list(LocalCompletionsAPI.parse_generations(outputs))

    def cost(self, instance: Instance) -> tuple[int, int]:
        """Tokens that a request reads, and the most that it writes."""
        text, *rest = instance.args
        if instance.request_type == "generate_until":
            n_written = rest[0].get("max_gen_toks", rest[0].get("max_tokens", self._max_gen_toks))
            return min(len(self.tok_encode(text)), self.max_length), n_written
        return min(len(self.tok_encode(text + rest[0] if rest else text)), self.max_length), 0

    def _note(self, outputs: Any, *, writes: bool) -> None:
        for answer in outputs if isinstance(outputs, list) else [outputs]:
            self.timings.update(counted_timings(answer, writes=writes))
            self.timings["requests"] += 1
            self._on_answer(len(answer["choices"]))


class Harness:
    """One run of lm-eval."""

    def __init__(self, request: HarnessRequest, send: Callable[[HarnessEvent], None]) -> None:
        """Loads the tasks and their data."""
        self._request, self._send = request, send
        self._n_done = self._n_total = 0
        # The thousands of built-in tasks are looked through only if one of them is named.
        has_names = not all(task.endswith((".yaml", ".yml")) for task in request.tasks)
        self._manager = TaskManager(include_defaults=has_names)
        self._tasks = self._manager.load(list(request.tasks))["tasks"]
        for name, task in self._tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ValueError(f"The task {name} runs code that the model writes, which is not done here.")
        send(Loaded(list(self._tasks)))

    def run(self, server: HarnessServer, key: str) -> None:
        """Tells what it will cost, evaluates, and tells the result."""
        request = self._request
        model = ServedModel(server, request, key, self._on_answer)
        planned = self._plan(model)
        self._send(planned)
        if request.only_plans:
            return
        self._n_done, self._n_total = 0, sum(planned.requests.values())
        model.timings.clear()
        result = simple_evaluate(
            model=model,
            tasks=list(request.tasks),
            task_manager=self._manager,
            num_fewshot=request.n_fewshot,
            limit=request.limit,
            apply_chat_template=request.chat,
            log_samples=request.keeps_samples,
            random_seed=request.seed,
            numpy_random_seed=request.seed,
            fewshot_random_seed=request.seed,
            torch_random_seed=None,
        )
        kept = {name: result[name] for name in _KEPT if name in result}
        versions = {name: metadata.version(name) for name in ("lm_eval", "datasets", "numpy")}
        plain = msgspec.json.decode(msgspec.json.encode(kept, enc_hook=_plain))
        self._send(Evaluated(plain, versions, {name: float(value) for name, value in model.timings.items()}))

    def _on_answer(self, n_choices: int) -> None:
        self._n_done += n_choices
        if self._n_total:
            self._send(Answered(self._n_done, self._n_total))

    def _plan(self, model: ServedModel) -> Planned:
        """Builds the requests, counts the tokens of some, and tries a few."""
        request, requests, counts = self._request, list[Instance](), dict[str, int]()
        for name, task in self._tasks.items():
            if request.n_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=request.n_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=request.seed)
            task.build_all_requests(
                limit=request.limit,
                rank=0,
                world_size=1,
                apply_chat_template=request.chat,
                fewshot_as_multiturn=True,
                chat_template=model.apply_chat_template if request.chat else None,
            )
            requests += task.instances
            counts[name] = sum(instance.repeats for instance in task.instances)
        n_requests = sum(counts.values())
        costs = [model.cost(one) for one in requests[:: max(1, len(requests) // _N_SAMPLED)]]
        n_read, n_written = (round(statistics.fmean(column) * n_requests) for column in zip(*costs, strict=True))
        tried = requests[:: max(1, len(requests) // _N_TRIED)][:_N_TRIED]
        # The first one warms up.
        seconds = statistics.fmean([_timed(model, instance) for instance in [tried[0], *tried]][1:])
        return Planned(counts, n_read, n_written, seconds * n_requests / request.n_parallel)


def _timed(model: ServedModel, instance: Instance) -> float:
    begin = time.monotonic()
    getattr(model, instance.request_type)([instance])
    return time.monotonic() - begin


def _plain(value: Any) -> Any:
    """What JSON has for one of lm-eval's values: numbers of numpy, names of functions."""
    return value.item() if hasattr(value, "item") else str(value)


def _unloaded(error: Exception, tasks: Sequence[str]) -> HarnessFailed:
    """Why tasks cannot be loaded, as a sentence."""
    text, names = " ".join(str(error).split()), ", ".join(tasks)
    if isinstance(error, KeyError) and "not a registered" in text:
        name = text.split("'")[1]
        return HarnessFailed(f"{name} {_NEITHER}. lm_eval ls tasks lists the tasks.", is_usage=True)
    if isinstance(error, OSError):
        hint = "slimoe downloads nothing: name a YAML file with its own data, or put them into the cache of datasets."
        return HarnessFailed(f"The data of {names} cannot be read ({text}). {hint}", is_usage=True)
    return HarnessFailed(f"{names} cannot be loaded ({type(error).__name__}: {text}).", is_usage=True)


def main() -> None:
    """Reads a request and a server from standard input, and writes events to standard output."""
    settle_in(int(sys.argv[1]))
    out = os.fdopen(os.dup(1), "wb")
    # Whatever prints on its own goes beside it.
    os.dup2(2, 1)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)

    def send(event: HarnessEvent) -> None:
        out.write(msgspec.json.encode(event) + b"\n")
        out.flush()

    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=HarnessRequest)
    try:
        harness = Harness(request, send)
    except Exception as error:
        logging.exception("The tasks cannot be loaded.")
        send(_unloaded(error, request.tasks))
        return
    server = msgspec.json.decode(sys.stdin.buffer.readline(), type=HarnessServer)
    try:
        harness.run(server, os.environ[KEY_VARIABLE])
    except Exception as error:
        logging.exception("lm-eval failed.")
        send(HarnessFailed(f"lm-eval ended with {type(error).__name__}: {' '.join(str(error).split())}"))


if __name__ == "__main__":
    main()
