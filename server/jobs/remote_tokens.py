"""The served model's tokenizer for lm-eval: ids with the model's own BOS. Apart: it is used without lm-eval."""

import json
import urllib.request
from typing import Any

_SECONDS = 600


def counted_timings(answer: dict[str, Any], *, writes: bool) -> dict[str, Any]:
    """An answer's timings, to be added up: as `decoded_n` and `decoded_ms` what speed of writing is told from.

    The first token comes from reading the prompt, so that answers of one token, as all are that only score a text,
    tell nothing of it.
    """
    counted = {name: value or 0 for name, value in answer.get("timings", {}).items()}
    n_decoded = counted.get("predicted_n", 0) - len(answer["choices"])
    if writes and n_decoded > 0:
        counted |= {"decoded_n": n_decoded, "decoded_ms": counted["predicted_ms"]}
    return counted


class RemoteTokens:
    """Asks the server at `url` for tokens, each text once."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        # No proxy of the environment: the server is on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._known: dict[tuple[str, bool], list[int]] = {}
        info = self.post("/tokenizer_info", None)
        self.bos: str | None = info["bos_token"]
        self.eos: str | None = info["eos_token"]

    def post(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The server's answer to a body, or to a question without one; raises OSError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        with self._opener.open(request, timeout=_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def encode(self, text: str, *, begins: bool) -> list[int]:
        """The ids of a text; one that `begins` a sequence gets BOS if the model wants one and the text has none yet."""
        adds = begins and not (self.bos and text.startswith(self.bos))
        if (text, adds) not in self._known:
            answer = self.post("/tokenize", {"prompt": text, "add_special_tokens": adds})
            self._known[text, adds] = answer["tokens"]
        return list(self._known[text, adds])

    @property
    def prefix(self) -> int:
        """The token before a text without context: BOS, or EOS where there is none, as lm-eval has it."""
        name = self.bos or self.eos
        if name is None:
            raise ValueError("The model has neither BOS nor EOS, so a text without context cannot be scored.")
        return self.encode(name, begins=False)[0]

    def rendered(self, messages: list[dict[str, str]], *, begins_answer: bool) -> str:
        """A conversation as the model's chat template writes it."""
        body = {"messages": messages, "add_generation_prompt": begins_answer}
        return str(self.post("/apply-template", body)["prompt"])
