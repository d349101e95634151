"""Preference losses against float64 references written from the papers, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from distill_trainers.losses.preference import (
    PREFERENCE_LOSSES,
    adaptive_skew,
    contrastive_skew,
    contrastive_weight,
    implicit_rewards,
    logprob_mse,
)
from distill_trainers.signals import TokenLogits

torch.set_default_dtype(torch.float32)


def _numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REFERENCES = {
    "sigmoid": lambda m, beta, gamma: math.log(1 + math.exp(-m)),
    "ipo": lambda m, beta, gamma: (m / beta - 0.5 / beta) ** 2,
    "hinge": lambda m, beta, gamma: max(0.0, 1 - m),
    "simpo": lambda m, beta, gamma: math.log(1 + math.exp(gamma - m)),
}
SLOPES = {
    "sigmoid": lambda m, beta, gamma: -1 / (1 + math.exp(m)),
    "ipo": lambda m, beta, gamma: 2 * (m / beta - 0.5 / beta) / beta,
    "hinge": lambda m, beta, gamma: -1.0 if m < 1 else 0.0,
    "simpo": lambda m, beta, gamma: -1 / (1 + math.exp(m - gamma)),
}


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_value_and_slope_are_the_papers(name):
    beta, gamma = 0.4, 0.7
    margin = torch.tensor([-3.0, -0.2, 0.0, 0.9, 4.0], dtype=torch.float64, requires_grad=True)
    loss = PREFERENCE_LOSSES[name](beta, gamma)(margin)
    loss.sum().backward()
    for m, value, slope in zip(margin.tolist(), loss.tolist(), margin.grad.tolist(), strict=True):
        assert value == pytest.approx(REFERENCES[name](m, beta, gamma), abs=1e-12)
        assert slope == pytest.approx(SLOPES[name](m, beta, gamma), abs=1e-12)


def test_losses_at_no_margin():
    nothing = torch.zeros(1, dtype=torch.float64)
    values = {name: loss(0.5, 0.3)(nothing).item() for name, loss in PREFERENCE_LOSSES.items()}
    assert values["sigmoid"] == pytest.approx(math.log(2), abs=1e-15)
    assert values["hinge"] == 1.0 and values["ipo"] == pytest.approx(1.0)  # (1 / 2β)²
    assert values["simpo"] == pytest.approx(math.log1p(math.exp(0.3)))


@pytest.mark.parametrize("normalized", [True, False])
def test_rewards_of_ragged_responses(normalized):
    """Each response is divided by its own length, and by nothing else."""
    student, reference, lengths = _numbers(4), _numbers(4, seed=1), torch.tensor([1.0, 2.0, 7.0, 40.0]).double()
    found = implicit_rewards(student, reference, lengths, beta=0.3, length_normalized=normalized)
    for i in range(4):
        expected = 0.3 * (student[i] - reference[i]) / (lengths[i] if normalized else 1)
        assert found[i].item() == pytest.approx(expected.item(), abs=1e-15)
    assert torch.equal(implicit_rewards(student, student, lengths, beta=0.3), torch.zeros(4, dtype=torch.float64))


def test_squared_difference_is_of_means():
    errors = logprob_mse(torch.tensor([-6.0, -2.0]), torch.tensor([-3.0, -2.0]), torch.tensor([3.0, 1.0]))
    assert errors.tolist() == [1.0, 0.0]


# ---- DistiLLM-2 -----------------------------------------------------------------------------------------------------


def _dense_skews(student, teacher, alpha):
    q, p = student.softmax(-1), teacher.softmax(-1)
    alpha = torch.as_tensor(alpha, dtype=torch.float64).expand(len(student))[:, None]
    forward = (p * (p / (alpha * p + (1 - alpha) * q)).log()).sum(-1)
    return forward, (q * (q / ((1 - alpha) * p + alpha * q)).log()).sum(-1)


@pytest.mark.parametrize("kinds", [(3, 4), (7, 0), (0, 7)])
@pytest.mark.parametrize("each", [False, True])
def test_contrastive_skew_takes_each_side_by_its_divergence(kinds, each):
    student, teacher = _numbers(7, 11).requires_grad_(), _numbers(7, 11, seed=1) * 2
    chosen = torch.tensor([1.0] * kinds[0] + [0.0] * kinds[1])
    alpha = torch.linspace(0.01, 0.1, 7, dtype=torch.float64) if each else 0.1
    terms = contrastive_skew(TokenLogits(student), TokenLogits(teacher), chosen, alpha)
    (terms["skew_chosen"] * 2 + terms["skew_rejected"] * 3).sum().backward()
    expected = student.detach().clone().requires_grad_()
    forward, reverse = _dense_skews(expected, teacher, alpha)
    on = chosen.double()
    ((forward * on) * 2 + (reverse * (1 - on)) * 3).sum().backward()
    assert torch.allclose(terms["skew_chosen"], forward * on, atol=1e-12)
    assert torch.allclose(terms["skew_rejected"], reverse * (1 - on), atol=1e-12)
    assert torch.allclose(student.grad, expected.grad, atol=1e-12)


def test_alpha_follows_the_gap_within_its_bounds():
    gaps = torch.tensor([-0.1, 0.0, 0.2, 0.19, 0.4], dtype=torch.float64)
    found = adaptive_skew(gaps, 0.2, 0.1)
    assert found.tolist() == pytest.approx([0.01, 0.01, 0.1, 1 - 0.9 * 0.2 / 0.19, 0.1])
    assert adaptive_skew(gaps, 0.0, 0.1).tolist() == [0.1] * 5, "no mean is known yet"


def test_the_rejected_side_gains_weight_in_the_first_half():
    assert [contrastive_weight(t) for t in (0.0, 0.25, 0.5, 1.0)] == [0.5, 0.625, 0.75, 0.75]
