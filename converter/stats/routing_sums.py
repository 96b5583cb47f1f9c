"""How tokens are routed: sums over the router's answers, and how they agree with later layers and later tokens."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.block import Routing
from slimoe.converter.source.model_source import ModelSource, block_key
from slimoe.converter.stats.statistics import N_AHEAD, N_BINS, LayerStatistics, RouterSums

Picks = NDArray[np.uint16]


class RoutingSums:
    """Gathers one layer's `RouterSums` from one sequence's routing after the other."""

    def __init__(self, n_row: int, n_used: int) -> None:
        self._n_row, self._n_used = n_row, n_used
        self._rank_count = np.zeros((n_row, n_used), np.int64)
        self._sums = np.zeros((5, n_row))
        self._logit_product = np.zeros((n_row, n_row))
        self._ratio_bins, self._top_bins = np.zeros(N_BINS, np.int64), np.zeros(N_BINS, np.int64)
        self._together = np.zeros((n_row, n_row), np.int64)
        self._to_next_token = np.zeros((n_row, n_row), np.int64)

    def add(self, routing: Routing) -> None:
        """One sequence's."""
        picks, shares = routing.picks.cpu().numpy(), routing.shares.double().cpu().numpy()
        logits = routing.logits.double()
        probabilities = routing.probabilities.double().cpu().numpy()
        picked = np.take_along_axis(probabilities, picks, 1)
        for rank in range(self._n_used):
            self._rank_count[:, rank] += np.bincount(picks[:, rank], minlength=self._n_row)
        by_pick = (_by_row(picks, values, self._n_row) for values in (shares, shares**2, picked))
        self._sums += np.stack([probabilities.sum(0), logits.sum(0).cpu().numpy(), *by_pick])
        self._logit_product += (logits.T @ logits).cpu().numpy()
        self._top_bins += histogram(shares[:, 0] / shares.sum(1))
        if self._n_used > 1:
            self._ratio_bins += histogram(shares[:, 1] / np.maximum(shares[:, 0], np.finfo(np.float64).tiny))
        self._together += pair_counts(picks, picks, (self._n_row, self._n_row))
        self._to_next_token += pair_counts(picks[:-1], picks[1:], (self._n_row, self._n_row))

    @property
    def n_picks(self) -> NDArray[np.int64]:
        """Picks of each row of the router [R] so far."""
        counts: NDArray[np.int64] = self._rank_count.sum(1)
        return counts

    def finish(self) -> RouterSums:
        """The sums; those that say something of later layers are empty until `link` fills them."""
        probability, logit, share, share_square, picked = self._sums
        return RouterSums(
            rank_count=self._rank_count,
            probability=probability,
            share=share,
            share_square=share_square,
            picked_probability=picked,
            ratio_bins=self._ratio_bins,
            top_bins=self._top_bins,
            together=self._together,
            logit=logit,
            logit_product=self._logit_product,
            ahead_hits=np.zeros((N_AHEAD, self._n_used, self._n_used), np.int64),
            to_next=np.zeros((self._n_row, 0), np.int64),
            to_next_token=self._to_next_token,
        )


def _by_row(picks: NDArray[np.int64], values: NDArray[np.float64], n_row: int) -> NDArray[np.float64]:
    return np.bincount(picks.ravel(), values.ravel(), n_row).astype(np.float64, copy=False)


def histogram(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Counts of values between 0 and 1 in `N_BINS` even bins; the last one takes 1 and what is beyond."""
    return np.bincount(np.minimum((values * N_BINS).astype(np.int64), N_BINS - 1), minlength=N_BINS)


def pair_counts(here: NDArray[np.integer], there: NDArray[np.integer], shape: tuple[int, int]) -> NDArray[np.int64]:
    """How many tokens have a row in `here` [T, k] and one in `there` [T, k], by both [shape]."""
    pairs = here.astype(np.int64)[:, :, None] * shape[1] + there.astype(np.int64)[:, None, :]
    return np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


class Foresight:
    """What the routers of the next layers would pick from this layer's input: `picks` [N_AHEAD, T, k].

    Source: the look-ahead gates of arXiv 2411.01433 and 2408.10284.
    """

    def __init__(self, source: ModelSource, layer: int, n_rows: int, device: str) -> None:
        self._n_used = source.spec.n_expert_used
        self._routers: dict[int, Tensor] = {}
        for ahead in range(N_AHEAD):
            later = layer + ahead + 1
            if later < len(source.layers) and source.layers[later].target:
                weight = source.read(block_key(later, "ffn_gate_inp"))
                self._routers[ahead] = torch.from_numpy(weight).to(device)
        self.picks: Picks = np.zeros((N_AHEAD, n_rows, self._n_used), np.uint16)

    def add(self, first_row: int, x: Tensor) -> None:
        """One sequence's normalised input [n, n_embd]."""
        for ahead, router in self._routers.items():
            picks = (x @ router.T).topk(self._n_used, -1).indices.cpu().numpy()
            self.picks[ahead, first_row : first_row + len(picks)] = picks


def link(layers: list[LayerStatistics], foreseen: list[Picks | None]) -> list[LayerStatistics]:
    """Fills in what a layer's sums say of later layers, now that all of them are known."""
    linked = []
    for n, layer in enumerate(layers):
        if layer.router is None or layer.trace is None:
            linked.append(layer)
            continue
        n_row, n_used = layer.router.rank_count.shape
        hits, to_next = np.zeros((N_AHEAD, n_used, n_used), np.int64), np.zeros((n_row, 0), np.int64)
        guesses = foreseen[n]
        for ahead, later in enumerate(layers[n + 1 : n + 1 + N_AHEAD]):
            if later.trace is None or later.router is None:
                continue
            if ahead == 0:
                to_next = pair_counts(layer.trace.picks, later.trace.picks, (n_row, len(later.router.probability)))
            if guesses is not None:
                hits[ahead] = (later.trace.picks[:, :, None] == guesses[ahead][:, None, :]).sum(0)
        linked.append(replace(layer, router=replace(layer.router, ahead_hits=hits, to_next=to_next)))
    return linked
