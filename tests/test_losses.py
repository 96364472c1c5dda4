"""Task losses against their formulas in numpy; BaLL's sampler against its probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lifequant.data.replay import epoch_order
from lifequant.losses import LOSSES, rebalancing_weights

COUNTS = np.array([50.0, 10, 0, 1, 39])  # class 2 is absent
PRESENT = COUNTS > 0
P = COUNTS / 100
R = np.array([1 / (4 * 0.5 + 1), 1 / (4 * 0.1 + 1), 1, 1 / (4 * 0.01 + 1), 1 / (4 * 0.39 + 1)])
LABELS = np.array([0, 0, 1, 3, 4, 4, 1])
PHI = np.random.default_rng(0).normal(0, 2, (len(LABELS), 5))


def softmax(phi: np.ndarray) -> np.ndarray:
    e = np.exp(phi - phi.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def nll(phi: np.ndarray) -> np.ndarray:
    return -np.log(softmax(phi)[np.arange(len(LABELS)), LABELS])


def class_balanced() -> float:
    weights = np.array([(1 - 0.9999) / (1 - 0.9999**n) if n else 0 for n in COUNTS])
    weights *= PRESENT.sum() / weights.sum()
    return (weights[LABELS] * nll(PHI)).mean()


def balanced_softmax() -> float:
    e = P * np.exp(PHI)
    return -np.log(e[np.arange(len(LABELS)), LABELS] / e.sum(1)).mean()


EXPECTED = {
    "ce": lambda: nll(PHI).mean(),
    "ball": lambda: nll(PHI + R * softmax(PHI)).mean(),
    "ball_negative": lambda: nll(PHI - R * softmax(PHI)).mean(),
    "ball_prior": lambda: nll(PHI + np.log(1 / R)).mean(),
    "balanced_softmax": balanced_softmax,
    "class_balanced": class_balanced,
}


def value(name: str, phi: np.ndarray) -> torch.Tensor:
    return LOSSES[name](torch.tensor(phi, requires_grad=True), torch.tensor(LABELS), torch.tensor(COUNTS))


@pytest.mark.parametrize("name", LOSSES)
def test_value(name):
    assert value(name, PHI).item() == pytest.approx(EXPECTED[name](), rel=1e-9)
    others = [EXPECTED[other]() for other in EXPECTED if other != name]
    assert min(abs(EXPECTED[name]() - other) for other in others) > 1e-3  # the data tells them apart


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name):
    """Finite, also of the absent class, and that of central differences."""
    phi = torch.tensor(PHI, requires_grad=True)
    LOSSES[name](phi, torch.tensor(LABELS), torch.tensor(COUNTS)).backward()
    assert torch.isfinite(phi.grad).all()
    for place in ((0, 0), (2, 3), (5, 2)):
        shift = np.zeros_like(PHI)
        shift[place] = 1e-5
        difference = (value(name, PHI + shift) - value(name, PHI - shift)).item() / 2e-5
        assert phi.grad[place].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_float32_is_precise():
    """The numbers that training sees: rare classes with one image, single precision."""
    for name, loss in LOSSES.items():
        found = loss(torch.tensor(PHI).float(), torch.tensor(LABELS), torch.tensor(COUNTS).float()).item()
        assert found == pytest.approx(EXPECTED[name](), rel=2e-5), name


def test_rebalancing_weights():
    """K is the number of classes present; equal classes have 1/2, an absent one 1."""
    np.testing.assert_allclose(rebalancing_weights(torch.tensor(COUNTS)), R)
    assert rebalancing_weights(torch.tensor([7.0, 7, 0, 7])).tolist() == [0.5, 0.5, 1, 0.5]


def test_ball_sampler():
    """Draws with replacement; each image's frequency is r of its class over the sum of r."""
    counts = np.array([6, 2, 0, 1])
    labels = torch.tensor([0, 1, 0, 0, 3, 0, 0, 1, 0])
    r = 1 / (3 * counts / 9 + 1)
    expected = r[labels] / r[labels].sum()
    generator = torch.Generator().manual_seed(0)
    epochs = [epoch_order(labels, torch.tensor(counts).float(), "ball", generator) for _ in range(4000)]
    assert all(len(epoch) == 9 for epoch in epochs)
    drawn = np.bincount(torch.cat(epochs), minlength=9) / (9 * 4000)
    np.testing.assert_allclose(drawn, expected, atol=4 * np.sqrt(0.25 / (9 * 4000)))
    assert drawn[4] > 2 * drawn[0]  # the single image of its class


def test_uniform_sampler():
    """Each image once an epoch, in an order of the generator's."""
    labels, counts = torch.tensor([0] * 20 + [1]), torch.tensor([20.0, 1])
    generator = torch.Generator().manual_seed(0)
    first, second = (epoch_order(labels, counts, "uniform", generator).tolist() for _ in range(2))
    assert first != second and sorted(first) == sorted(second) == list(range(21))
