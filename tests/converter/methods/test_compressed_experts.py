"""Vectors in place of experts that are not computed: fitted as numpy's least squares fits them, and never worse."""

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.expert import AuxVectors
from slimoe.converter.methods.compressed_experts import AuxSample, fit_vectors, held_out_rows

N_ROW, N_EMBD, N_AUX = 6, 5, 2


def random_sample(n: int, seed: int = 0) -> AuxSample:
    torch.manual_seed(seed)
    selected = torch.rand(n, N_ROW).topk(N_AUX).indices
    return AuxSample(torch.randn(n, N_EMBD), torch.randn(n, N_EMBD), selected, 0.1 + torch.rand(n, N_AUX))


def changes(sample: AuxSample, vectors: AuxVectors) -> Tensor:
    """What the vectors add to the total, token by token."""
    found = torch.zeros_like(sample.total)
    for n, (total, rows, weights) in enumerate(zip(sample.total, sample.selected, sample.weights, strict=True)):
        for row, weight in zip(rows, weights, strict=True):
            found[n] += total * vectors.gain[row] * weight / weights.sum() + weight * vectors.shift[row]
    return found


def random_vectors(seed: int = 1) -> AuxVectors:
    torch.manual_seed(seed)
    return AuxVectors(torch.randn(N_ROW, N_EMBD), torch.randn(N_ROW, N_EMBD))


def test_vectors_that_explain_everything_are_found() -> None:
    sample, true = random_sample(4000), random_vectors()
    sample = AuxSample(sample.total, changes(sample, true), sample.selected, sample.weights)
    found = fit_vectors(sample, N_ROW, torch.arange(4000) >= 3000)
    assert found.after < 0.02 * found.before
    torch.testing.assert_close(found.vectors.gain, true.gain, atol=0.2, rtol=0.1)
    torch.testing.assert_close(found.vectors.shift, true.shift, atol=0.2, rtol=0.1)


def test_they_are_numpys_least_squares_with_a_ridge() -> None:
    sample, held = random_sample(300), torch.arange(300) >= 200
    true = random_vectors()
    missing = changes(sample, true) + 0.3 * sample.missing
    sample = AuxSample(sample.total, missing, sample.selected, sample.weights)
    found = fit_vectors(sample, N_ROW, held).vectors
    shares, weights = np.zeros((200, N_ROW)), np.zeros((200, N_ROW))
    for n in range(200):
        for row, weight in zip(sample.selected[n].tolist(), sample.weights[n].tolist(), strict=True):
            shares[n, row], weights[n, row] = weight / float(sample.weights[n].sum()), weight
    for component in range(N_EMBD):
        total, wanted = (part[:200, component].double().numpy() for part in (sample.total, missing))
        gains = shares * total[:, None]
        # A ridge is further rows of the system, which want zeros.
        scales = [np.sqrt(0.03 * np.square(part).sum(0).mean()) for part in (gains, weights)]
        ridge = np.diag(np.repeat(scales, N_ROW))
        system = np.concatenate((np.concatenate((gains, weights), 1), ridge))
        expected = np.linalg.lstsq(system, np.concatenate((wanted, np.zeros(2 * N_ROW))), rcond=None)[0]
        np.testing.assert_allclose(found.gain[:, component], expected[:N_ROW], atol=1e-3)
        np.testing.assert_allclose(found.shift[:, component], expected[N_ROW:], atol=1e-3)


def test_errors_are_those_of_the_held_out_tokens() -> None:
    sample, held = random_sample(400), torch.arange(400) % 4 == 0
    missing = changes(sample, random_vectors()) + sample.missing
    sample = AuxSample(sample.total, missing, sample.selected, sample.weights)
    found = fit_vectors(sample, N_ROW, held)
    left = (sample.missing - changes(sample, found.vectors))[held].square().sum(1).mean()
    np.testing.assert_allclose(found.after, float(left), rtol=1e-4)
    np.testing.assert_allclose(found.before, float(sample.missing[held].square().sum(1).mean()), rtol=1e-4)


def test_of_noise_nothing_is_made() -> None:
    for seed in range(3):
        found = fit_vectors(random_sample(60, seed), N_ROW, torch.arange(60) >= 40)
        assert found.after <= found.before
        if found.after == found.before:
            assert not found.vectors.gain.any()
            assert not found.vectors.shift.any()


def test_a_quarter_is_held_out_by_sequences_where_there_are_enough() -> None:
    assert held_out_rows([3, 2, 1, 2]).tolist() == [False] * 6 + [True] * 2
    assert held_out_rows([8, 4]).tolist() == [False] * 6 + [True] * 2 + [False] * 3 + [True]
