"""lm-eval's model for completions servers: log-likelihoods and continuations, with the server's own tokenizer."""

import sys
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from bench.clients.cells import expect, report

URL = sys.argv[1]


def model() -> Any:
    """The client, which asks the server for its tokenizer."""
    return LocalCompletionsAPI(
        base_url=f"{URL}/v1/completions", model="demo", tokenizer_backend="remote", max_length=512
    )


def scoring() -> None:
    """A likely word is likelier than an unlikely one, and scores are the same when asked again."""
    pairs = (("The river is", " a"), ("The river is", " zzq"))
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    first, again = model().loglikelihood(asked), model().loglikelihood(asked)
    expect(first[0][0] > first[1][0] and first == again, (first, again))


def completions() -> None:
    """A text is continued up to a stop string."""
    asked = [Instance("generate_until", {}, ("The river is", {"until": ["\n"], "max_gen_toks": 8}), 0)]
    expect(isinstance(model().generate_until(asked)[0], str), "no text")


if __name__ == "__main__":
    report("lm-eval", scoring, completions)
