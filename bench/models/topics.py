"""Random models and random text that route as trained models do: every token belongs to a topic, and topics last.

Weights drawn evenly choose experts evenly and forget the choice at once, which no trained model does. Here a token's
embedding leans towards a direction that its topic shares, so that the routers, random as they are, prefer some
experts while a topic lasts; and attention and the feed-forward parts change the stream less than drawn evenly, so
that an earlier layer's stream says something about a later layer's choice. `bench.routing_stats` measures what
comes out, next to a trained model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bench.baselines.stepping import random_tokens

N_TOPICS = 32
TOPIC_TOKENS = 50
"""How long a topic lasts in the mean."""
FAITHFUL = 0.6
"""The share of tokens that belong to the topic; the others belong to any."""


@dataclass(frozen=True, slots=True)
class RoutingStyle:
    """What is changed about weights drawn with the deviation that keeps activations near 1.

    `topical` is the share of the topic in the length of an embedding, 0 to 1; the others are factors on the output
    of attention, on the down projections and on the router.
    """

    topical: float = 0.0
    attention: float = 1.0
    feed_forward: float = 1.0
    router: float = 1.0


STYLES = {
    "uniform": RoutingStyle(),
    "natural": RoutingStyle(topical=0.6, attention=0.5, feed_forward=0.6, router=1.6),
}
"""Every value of --routing."""


def natural_tokens(n_tokens: int, n_vocab: int, seed: int = 1) -> list[int]:
    """Fixed tokens in which topics last and, within a topic, few words are frequent and most are rare (Zipf's law).

    The topic of token t is t modulo N_TOPICS, as in the embeddings that `topical_rows` draws.
    """
    rng = np.random.default_rng(seed)
    n_words = max(1, n_vocab // N_TOPICS)
    frequency = 1 / np.arange(1, n_words + 1)
    words = rng.choice(n_words, n_tokens, p=frequency / frequency.sum())
    strays = rng.random(n_tokens) > FAITHFUL
    changes = rng.random(n_tokens) < 1 / TOPIC_TOKENS
    changes[:1] = True
    subjects = rng.integers(0, N_TOPICS, n_tokens)[np.maximum.accumulate(np.where(changes, np.arange(n_tokens), 0))]
    topics = np.where(strays, rng.integers(0, N_TOPICS, n_tokens), subjects)
    return [int(token) for token in (words * N_TOPICS + topics) % n_vocab]


TOKENS = {"uniform": random_tokens, "natural": natural_tokens}
"""The tokens that belong to each of STYLES: (n_tokens, n_vocab, seed) to token ids."""


def topical_rows(n_rows: int, n_embd: int, topical: float, seed: int, rows_at_once: int) -> Iterator[np.ndarray]:
    """Embeddings of deviation 1 of the tokens 0 to `n_rows`, float32 [at most rows_at_once, n_embd] at a time."""
    rng = np.random.default_rng([seed, N_TOPICS])
    topics = rng.standard_normal((N_TOPICS, n_embd), np.float32)
    for begin in range(0, n_rows, rows_at_once):
        tokens = np.arange(begin, min(begin + rows_at_once, n_rows))
        own = rng.standard_normal((len(tokens), n_embd), np.float32)
        yield np.float32((1 - topical**2) ** 0.5) * own + np.float32(topical) * topics[tokens % N_TOPICS]
