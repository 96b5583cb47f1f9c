"""Sums over the routing of tokens, and over its agreement with the routing of later layers and later tokens."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.block import read_ffn_norm, read_router
from slimoe.converter.forward.routing import Router, Routing, route
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import N_AHEAD, N_BINS, LayerStatistics, RouterSums

Selected = NDArray[np.uint16]
"""Rows of a router that tokens select."""


class RoutingSums:
    """Gathers one layer's `RouterSums`, one sequence after the other."""

    def __init__(self, n_row: int, n_used: int) -> None:
        self._n_row, self._n_used = n_row, n_used
        self._rank_count = np.zeros((n_row, n_used), np.int64)
        self._sums = np.zeros((5, n_row))
        self._logit_product = np.zeros((n_row, n_row))
        self._ratio_bins, self._top_bins = np.zeros(N_BINS, np.int64), np.zeros(N_BINS, np.int64)
        self._together = np.zeros((n_row, n_row), np.int64)
        self._to_next_token = np.zeros((n_row, n_row), np.int64)

    def add(self, routing: Routing) -> None:
        """Adds the routing of one sequence."""
        selected, weights = routing.selected.cpu().numpy(), routing.weights.double().cpu().numpy()
        logits = routing.logits.double()
        probabilities = routing.probabilities.double().cpu().numpy()
        of_selected = np.take_along_axis(probabilities, selected, 1)
        for rank in range(self._n_used):
            self._rank_count[:, rank] += np.bincount(selected[:, rank], minlength=self._n_row)
        by_row = [
            np.bincount(selected.ravel(), values.ravel(), self._n_row) for values in (weights, weights**2, of_selected)
        ]
        self._sums += np.stack([probabilities.sum(0), logits.sum(0).cpu().numpy(), *by_row])
        self._logit_product += (logits.T @ logits).cpu().numpy()
        # A bias of the choice can put a smaller weight first.
        largest = -np.sort(-weights, axis=1)
        self._top_bins += histogram(largest[:, 0] / largest.sum(1))
        if self._n_used > 1:
            self._ratio_bins += histogram(largest[:, 1] / np.maximum(largest[:, 0], np.finfo(np.float64).tiny))
        self._together += pair_counts(selected, selected, (self._n_row, self._n_row))
        self._to_next_token += pair_counts(selected[:-1], selected[1:], (self._n_row, self._n_row))

    @property
    def n_selected(self) -> NDArray[np.int64]:
        """How often each row of the router [R] has been selected so far."""
        counts: NDArray[np.int64] = self._rank_count.sum(1)
        return counts

    def finish(self) -> RouterSums:
        """The sums; those that compare with later layers are empty until `link` fills them."""
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


def histogram(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Counts values between 0 and 1 in `N_BINS` even bins; the last one also has those of 1 and above."""
    return np.bincount(np.minimum((values * N_BINS).astype(np.int64), N_BINS - 1), minlength=N_BINS)


def pair_counts(here: NDArray[np.integer], there: NDArray[np.integer], shape: tuple[int, int]) -> NDArray[np.int64]:
    """Counts, by pair of rows [shape], tokens with the first row in `here` [T, k] and the second in `there` [T, k]."""
    pairs = here.astype(np.int64)[:, :, None] * shape[1] + there.astype(np.int64)[:, None, :]
    return np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


class RouterPrediction:
    """Predicts the experts of the next layers: `selected` [N_AHEAD, T, k] by their routers from this layer's input.

    Source: the look-ahead gates of arXiv 2411.01433 and 2408.10284.
    """

    def __init__(self, source: ModelSource, layer: int, n_rows: int, device: str) -> None:
        self._spec = source.spec
        self._routers: dict[int, Router] = {}
        for ahead in range(N_AHEAD):
            later = layer + ahead + 1
            router = read_router(source, later, device) if later < len(source.layers) else None
            if router is not None and router.scale is not None:
                # It reads the stream by a vector of its own, whatever the norm before this layer's experts.
                norm = read_ffn_norm(source, layer, device).weight
                router = replace(router, scale=router.scale * router.norm.weight / norm)
            if router is not None:
                self._routers[ahead] = router
        self.selected: Selected = np.zeros((N_AHEAD, n_rows, source.spec.n_expert_used), np.uint16)

    def add(self, first_row: int, x: Tensor) -> None:
        """Adds the router's normalised inputs [n, n_embd] of one sequence."""
        for ahead, router in self._routers.items():
            selected = route(router, self._spec, x).selected.cpu().numpy()
            self.selected[ahead, first_row : first_row + len(selected)] = selected


def link(layers: list[LayerStatistics], predicted: list[Selected | None]) -> list[LayerStatistics]:
    """The layers, with the sums that compare them with later layers filled in."""
    linked = []
    for n, layer in enumerate(layers):
        if layer.router is None or layer.trace is None:
            linked.append(layer)
            continue
        n_row, n_used = layer.router.rank_count.shape
        hits, to_next = np.zeros((N_AHEAD, n_used, n_used), np.int64), np.zeros((n_row, 0), np.int64)
        guesses = predicted[n]
        for ahead, later in enumerate(layers[n + 1 : n + 1 + N_AHEAD]):
            if later.trace is None or later.router is None:
                continue
            if ahead == 0:
                to_next = pair_counts(layer.trace.picks, later.trace.picks, (n_row, len(later.router.probability)))
            if guesses is not None:
                hits[ahead] = (later.trace.picks[:, :, None] == guesses[ahead][:, None, :]).sum(0)
        linked.append(replace(layer, router=replace(layer.router, ahead_hits=hits, to_next=to_next)))
    return linked
