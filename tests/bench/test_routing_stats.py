"""Routing as the bench sees it, next to transformers; its figures by hand; random models that route naturally."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bench.baselines.stepping import random_tokens
from bench.models.random_model import write_random_model
from bench.models.shapes import SHAPES
from bench.models.topics import N_TOPICS, TOPIC_TOKENS, natural_tokens, topical_rows
from bench.routing_stats import first_repeats, frequencies, lookahead, lru_hits, repeats, statistics
from bench.traces.routing import Routers, Routing, best, observe

N_TOKENS = 24


def test_routers_are_seen_as_transformers_shows_them(moe_checkpoint: Path, moe_gguf: Path) -> None:
    tokens = random_tokens(N_TOKENS, 500)
    model = transformers.AutoModelForCausalLM.from_pretrained(moe_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack(model(torch.tensor([tokens]), output_router_logits=True).router_logits).numpy()
    routing = observe(moe_gguf, [random_tokens(7, 500, seed=9), tokens], n_threads=1)[1]
    assert routing.n_used == model.config.num_experts_per_tok
    np.testing.assert_allclose(routing.logits, expected, atol=0.02)  # the F16 cache of llama.cpp
    weights = torch.softmax(torch.from_numpy(expected), dim=-1).topk(routing.n_used, dim=-1)
    assert (routing.selected == weights.indices.numpy()).mean() > 0.98
    np.testing.assert_allclose(routing.expert_weights.sum(axis=2), 1, rtol=1e-6)
    theirs = weights.values / weights.values.sum(dim=-1, keepdim=True)
    np.testing.assert_allclose(routing.expert_weights, theirs.numpy(), atol=0.02)


def test_a_router_on_its_own_input_says_what_was_seen(moe_gguf: Path) -> None:
    routing = observe(moe_gguf, [random_tokens(N_TOKENS, 500)], n_threads=1)[0]
    routers = Routers.read(moe_gguf)
    for layer, stream in enumerate(routing.inputs):
        np.testing.assert_allclose(routers.logits(layer, stream), routing.logits[layer], atol=1e-3)
    assert lookahead([routing], routers, 0) == pytest.approx(1)
    ahead = lookahead([routing], routers, 1)
    by_hand = [
        len(set(row) & set(other)) / routing.n_used
        for row, other in zip(
            routing.selected[1].tolist(),
            best(routers.logits(1, routing.inputs[0]), routing.n_used).tolist(),
            strict=True,
        )
    ]
    assert ahead == pytest.approx([np.mean(by_hand)])


def selecting(*experts: tuple[int, int]) -> Routing:
    """One layer of four experts, of which each token selects these two."""
    logits = np.full((1, len(experts), 4), -9, np.float32)
    for token, (first, second) in enumerate(experts):
        logits[0, token, first], logits[0, token, second] = 2, 1
    return Routing(logits, np.zeros((1, len(experts), 8), np.float32), n_used=2)


def test_figures_by_hand() -> None:
    text = selecting((0, 1), (0, 2), (2, 0), (1, 3))
    assert frequencies([text])[0] == pytest.approx([3 / 8, 2 / 8, 2 / 8, 1 / 8])
    assert first_repeats([text]) == pytest.approx([1 / 3])
    assert repeats([text]) == pytest.approx([(1 / 2 + 1 + 0) / 3])
    assert lru_hits([text], 2) == pytest.approx([3 / 8])
    assert lru_hits([text], 3) == pytest.approx([4 / 8])
    assert lru_hits([text], 4) == pytest.approx([4 / 8])
    assert text.expert_weights[0, 0] == pytest.approx([np.e / (1 + np.e), 1 / (1 + np.e)])


def test_nothing_repeats_from_one_text_to_the_next() -> None:
    """The last token of a text is not the one before the next text's first; a cache stays as it is."""
    texts = [selecting((0, 1), (2, 3)), selecting((2, 3), (0, 1))]
    assert first_repeats(texts) == pytest.approx([0])
    assert repeats(texts) == pytest.approx([0])
    assert lru_hits(texts, 2) == pytest.approx([2 / 8])


def test_natural_tokens_have_topics_that_last_and_frequent_words() -> None:
    n_vocab = 32 * N_TOPICS
    tokens = np.array(natural_tokens(20_000, n_vocab, seed=4))
    assert natural_tokens(20_000, n_vocab, seed=4) == tokens.tolist()
    assert natural_tokens(8, n_vocab, seed=5) != tokens[:8].tolist()
    assert tokens.min() >= 0
    assert tokens.max() < n_vocab
    topics = tokens % N_TOPICS

    def same(distance: int) -> float:
        return float(np.mean(topics[distance:] == topics[:-distance]))

    assert same(1) == pytest.approx(0.6**2, abs=0.08)
    assert same(20 * TOPIC_TOKENS) == pytest.approx(1 / N_TOPICS, abs=0.02)
    counts = np.sort(np.bincount(tokens // N_TOPICS))[::-1]
    assert counts[0] > 3 * counts[4] > 0
    assert max(natural_tokens(100, 5)) < 5, "fewer tokens than topics"


def test_embeddings_of_a_topic_lean_the_same_way() -> None:
    rows = np.concatenate(list(topical_rows(3 * N_TOPICS, 512, 0.6, seed=1, rows_at_once=50)))
    assert rows.shape == (3 * N_TOPICS, 512)
    assert rows.std() == pytest.approx(1, rel=0.05)
    alike = np.corrcoef(rows)
    assert np.mean([alike[t, t + N_TOPICS] for t in range(N_TOPICS)]) == pytest.approx(0.36, abs=0.04)
    assert np.mean([alike[t, t + 1] for t in range(N_TOPICS)]) == pytest.approx(0, abs=0.04)


def test_natural_routing_lasts_longer_and_is_predicted_better(tmp_path: Path) -> None:
    """Between chance and a trained model: where published figures of Mixtral and those of a small one lie."""
    means = {}
    for routing, tokens in (("natural", natural_tokens), ("uniform", random_tokens)):
        path = tmp_path / f"{routing}.gguf"
        write_random_model(path, SHAPES["natural_small"].spec, kind="F16", routing=routing)
        texts = [tokens(192, SHAPES["natural_small"].n_vocab, seed) for seed in (1, 2)]
        figures = statistics(observe(path, texts, n_threads=1), Routers.read(path))
        means[routing] = {name: float(np.mean(values)) for name, values in figures.items()}
        path.unlink()
    natural, uniform = means["natural"], means["uniform"]
    assert 0.17 < natural["repeat_first"] < 0.35
    assert uniform["repeat_first"] < natural["repeat_first"] - 0.03
    assert 0.56 < natural["lru_50%"] < 0.72
    assert 0.78 < natural["lookahead_1"] < 0.9
    assert natural["lookahead_1"] > natural["lookahead_2"] > uniform["lookahead_2"]
