"""Rewards, returns, weights and advantages against closed forms, with ragged rows, padding and long texts."""

from __future__ import annotations

import math

import pytest
import torch

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.losses.policy_gradient import (
    clipped_surrogate,
    importance_weights,
    is_clipped,
    mixture_share,
    probability_ratio,
    returns_after,
    sequence_advantages,
    sequence_rewards,
)

# Two prompts of one and two tokens, completions of three and one, one column of padding; what is masked is nonsense.
MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
NAN = math.nan
Q = torch.tensor([[NAN, -1.0, -2.0, -0.5, math.inf], [7.0, NAN, -3.0, -math.inf, NAN]])
P = torch.tensor([[1.0, -1.5, -1.0, -2.5, NAN], [NAN, 9.0, -1.0, NAN, -math.inf]])
DRAWN = torch.tensor([[NAN, -1.2, -1.7, -0.9, 0.0], [0.0, 0.0, -2.4, NAN, NAN]])


def test_closed_forms_of_a_ragged_batch():
    rewards = sequence_rewards(Q, P, MASK)
    torch.testing.assert_close(rewards, torch.tensor([[0, -0.5, 1.0, -2.0, 0], [0, 0, 2.0, 0, 0]]))
    after = returns_after(rewards, MASK)
    torch.testing.assert_close(after, torch.tensor([[0, 1.0 - 2.0, -2.0, 0, 0], [0, 0, 0, 0, 0]]))
    mean = returns_after(rewards, MASK, normalise=True)
    torch.testing.assert_close(mean, torch.tensor([[0, -0.5, -2.0, 0, 0], [0, 0, 0, 0, 0]]))
    discounted = returns_after(rewards, MASK, gamma=0.5)
    torch.testing.assert_close(discounted, torch.tensor([[0, 1.0 - 0.5 * 2.0, -2.0, 0, 0], [0, 0, 0, 0, 0]]))
    assert returns_after(rewards, MASK, gamma=0.0)[0].tolist() == [0, 1.0, -2.0, 0, 0]


def test_scaled_before_clipped():
    rewards = sequence_rewards(Q, P, MASK, scale=0.5, clip=0.6)
    torch.testing.assert_close(rewards, torch.tensor([[0, -0.25, 0.5, -0.6, 0], [0, 0, 0.6, 0, 0]]))


def test_weights_and_advantages_are_their_products():
    w = (Q - DRAWN).exp()
    before, through = importance_weights(Q, DRAWN, MASK, "token")
    assert torch.equal(before, through)
    torch.testing.assert_close(before[MASK], w[MASK])
    assert not before[~MASK].any()
    before, through = importance_weights(Q, DRAWN, MASK, "prefix")
    a, b, c = w[0, 1:4].tolist()
    torch.testing.assert_close(through[0], torch.tensor([0, a, a * b, a * b * c, 0]))
    torch.testing.assert_close(before[0], torch.tensor([0, 1.0, a, a * b, 0]))
    assert before[1, 2] == 1.0
    rewards = sequence_rewards(Q, P, MASK)
    exact = sequence_advantages(rewards, through, MASK, "prefix")
    torch.testing.assert_close(exact[0], torch.tensor([0, a * b * 1.0 - a * b * c * 2.0, -a * b * c * 2.0, 0, 0]))
    paper = sequence_advantages(rewards, importance_weights(Q, DRAWN, MASK)[1], MASK, "token", normalise=True)
    torch.testing.assert_close(paper[0], torch.tensor([0, a * -0.5, b * -2.0, 0, 0]))


def test_on_policy_weights_are_exactly_1():
    for kind in ("token", "prefix"):
        for weights in importance_weights(Q, Q, MASK, kind):
            assert torch.equal(weights, MASK.float())


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigurationError, match="importance: whole.*token, prefix"):
        importance_weights(Q, Q, MASK, "whole")


def _advantages(q, p, drawn, mask, kind="prefix", **how):
    rewards = sequence_rewards(q, p, mask)
    _, through = importance_weights(q, drawn, mask, kind)
    return sequence_advantages(rewards, through, mask, kind, **how)


@pytest.mark.parametrize("how", [{}, {"gamma": 0.9}, {"normalise": True}, {"gamma": 0.9, "normalise": True}], ids=str)
@pytest.mark.parametrize("kind", ["token", "prefix"])
def test_padding_and_order_change_nothing(kind, how):
    draw = torch.Generator().manual_seed(1)
    q, p, drawn = -3 * torch.rand(3, 5, 9, generator=draw, dtype=torch.float64)
    lengths = torch.tensor([9, 1, 4, 6, 2])
    mask = torch.arange(9) < lengths[:, None]
    whole = _advantages(q, p, drawn, mask, kind, **how)
    for row, length in enumerate(lengths.tolist()):  # each by itself, without padding
        part = (slice(row, row + 1), slice(0, length))
        torch.testing.assert_close(whole[part], _advantages(q[part], p[part], drawn[part], mask[part], kind, **how))
    around = [torch.nn.functional.pad(each, (3, 4), value=NAN) for each in (q, p, drawn)]
    padded = _advantages(*around, torch.nn.functional.pad(mask, (3, 4)), kind, **how)
    torch.testing.assert_close(padded[:, 3:-4], whole)
    order = torch.tensor([3, 0, 4, 2, 1])
    mixed = _advantages(q[order], p[order], drawn[order], mask[order], kind, **how)
    torch.testing.assert_close(mixed, whole[order])


def test_the_discount_goes_by_distance_and_not_by_place():
    """A longer prompt in front is no reason for smaller advantages."""
    rewards, mask = torch.ones(1, 4), torch.ones(1, 4).bool()
    near = returns_after(rewards, mask, gamma=0.5)
    far = returns_after(torch.nn.functional.pad(rewards, (50, 0)), torch.nn.functional.pad(mask, (50, 0)), gamma=0.5)
    torch.testing.assert_close(far[:, 50:], near)
    torch.testing.assert_close(near, torch.tensor([[1.75, 1.5, 1.0, 0.0]]))


@pytest.mark.parametrize("how", [{}, {"gamma": 0.99, "normalise": True}], ids=str)
@pytest.mark.parametrize("kind", ["token", "prefix"])
def test_long_texts_in_bf16_stay_finite(kind, how):
    """8192 tokens whose prefix weight would be e^1800 or e^-1800; float32 ends at e^88."""
    shape, mask = (2, 8192), torch.ones(2, 8192).bool()
    q = torch.full(shape, -2.0, dtype=torch.bfloat16)
    p = torch.full(shape, -30.0, dtype=torch.bfloat16)
    drawn = q - torch.tensor([[0.22], [-0.22]], dtype=torch.bfloat16)
    found = _advantages(q, p, drawn, mask, kind, **how)
    assert found.dtype == torch.float32 and found.isfinite().all()
    ratio = probability_ratio(torch.zeros(3), torch.tensor([-200.0, 0.0, 200.0]).sub(100.0))
    assert ratio.isfinite().all()


def test_what_comes_back_is_a_constant():
    q = Q.clone().requires_grad_()
    assert not _advantages(q, P, DRAWN, MASK).requires_grad


@pytest.mark.parametrize("clip", [0.2, None])
def test_surrogate_against_its_definition(clip):
    logps = torch.linspace(-1, 1, 41, dtype=torch.float64, requires_grad=True)
    for advantage in (-2.0, 3.0):
        ratio = probability_ratio(logps, torch.zeros_like(logps))
        values = clipped_surrogate(ratio, torch.full_like(ratio, advantage), clip)
        (slope,) = torch.autograd.grad(values.sum(), logps)
        for place, r in enumerate(logps.detach().exp().tolist()):
            bounded = r if clip is None else min(max(r, 1 - clip), 1 + clip)
            assert values[place].item() == pytest.approx(min(r * advantage, bounded * advantage))
            free = bounded == r or r * advantage < bounded * advantage
            assert slope[place].item() == pytest.approx(r * advantage if free else 0.0)
            moved = is_clipped(ratio, torch.full_like(ratio, advantage), clip)[place].item()
            assert moved == float(not free)
    at_one = torch.zeros(1, requires_grad=True)
    clipped_surrogate(probability_ratio(at_one, torch.zeros(1)), torch.tensor([3.0]), clip).backward()
    assert at_one.grad.item() == 3.0, "the policy gradient itself"


def test_the_teachers_share_of_a_mixture():
    p, q, alpha = torch.tensor([[0.5, 0.1]]), torch.tensor([[0.25, 0.9]]), 0.2
    drawn = alpha * p + (1 - alpha) * q
    share = mixture_share(p.log(), drawn.log(), alpha, torch.tensor([[True, True]]))
    torch.testing.assert_close(share, torch.tensor([[0.1 / 0.3, 0.02 / 0.74]]))
