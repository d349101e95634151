"""Weights for text of another sampler, against their definition in Python's floats."""

from __future__ import annotations

import math

import pytest
import torch

from distill_trainers.losses.sampler_ratio import (
    LOG_RATIO,
    OUTSIDE,
    RATIO,
    SAMPLED,
    SAMPLER_LOGPS,
    WEIGHT,
    SamplerRatio,
    sampler_weights,
    weighted,
)
from distill_trainers.signals import TokenLogits

KINDS = ["none", "truncate", "mask", "prefix"]
BOUNDS = [(None, 2.0), (0.5, 2.0), (0.9, None)]


def written_out(logs, kind, least, most):
    """Both weights of one row of sampled tokens."""
    ratios = [math.exp(log) for log in logs]
    low, high = -math.inf if least is None else least, math.inf if most is None else most
    bounded = {
        "none": [1.0 for _ in ratios],
        "truncate": [min(max(r, low), high) for r in ratios],
        "mask": [r if low <= r <= high else 0.0 for r in ratios],
        "prefix": [math.prod(ratios[: t + 1]) for t in range(len(ratios))],
    }[kind]
    return [1.0, *bounded[:-1]], bounded


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_written_out(kind, bounds):
    """Whatever stands outside the sampled tokens."""
    generator = torch.Generator().manual_seed(3)
    logs = torch.randn(6, 9, generator=generator, dtype=torch.float64) * 0.8
    spans = [(0, 9), (2, 5), (4, 9), (3, 4), (8, 9), (5, 5)]
    mask = torch.zeros(6, 9, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    noisy = torch.where(mask, logs, torch.nan)
    before, through = sampler_weights(noisy, mask, kind, *bounds)
    assert before.dtype == torch.float64 and not before[~mask].any() and not through[~mask].any()
    for row, (start, end) in enumerate(spans[:-1]):
        expected = written_out(logs[row, start:end].tolist(), kind, *bounds)
        assert before[row, start:end].tolist() == pytest.approx(expected[0], rel=1e-12)
        assert through[row, start:end].tolist() == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_and_absurd_ratios_stay_numbers(kind):
    """A token that the student's filter drops has the ratio 0, and so have products through it."""
    logs = torch.tensor([[0.0, -math.inf, 0.0, 900.0, 0.0]])
    for weights in sampler_weights(logs, torch.ones_like(logs, dtype=torch.bool), kind, 0.0, 3.0):
        assert weights.isfinite().all() and (weights >= 0).all()
    before, _ = sampler_weights(logs, torch.ones_like(logs, dtype=torch.bool), kind, None, 3.0)
    assert (
        before[0].tolist()
        == {
            "none": [1, 1, 1, 1, 1],
            "truncate": [1, 1, 0, 1, 3],
            "mask": [1, 1, 0, 1, 0],
            "prefix": [1, 1, 0, 0, 0],
        }[kind]
    )


def test_a_weight_of_0_takes_out_what_is_infinite():
    values = torch.tensor([math.inf, 2.0, 3.0], requires_grad=True)
    found = weighted(values, torch.tensor([0.0, 0.5, 1.0]))
    assert found.tolist() == [0.0, 1.0, 3.0]
    assert torch.autograd.grad(found.sum(), values)[0].tolist() == [0.0, 0.5, 1.0]


def test_ratios_are_of_distributions_of_one_kind_whatever_the_chunks():
    """Temperature and a filter on the student's side; unknown tokens have no ratio, and the weight 1."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (7,), generator=generator)
    told = -3 * torch.rand(7, generator=generator, dtype=torch.float64)
    sampled = torch.tensor([1.0, 1, 1, 0, 0, 1, 1])

    def processed(scores):
        return (scores / 0.7).masked_fill(scores < scores.max(-1, keepdim=True).values - 1.5, -math.inf)

    ratio = SamplerRatio("truncate", None, 2.0, processed)
    tokens = {"labels": labels, SAMPLER_LOGPS: told * sampled, SAMPLED: sampled}
    chunks = [slice(0, 3), slice(3, 3), slice(3, 7)]
    parts = [ratio.terms(TokenLogits(logits[c]), None, {k: v[c] for k, v in tokens.items()}) for c in chunks]
    terms = {LOG_RATIO: torch.cat([part[LOG_RATIO] for part in parts])}
    expected = []
    for row in range(7):
        kept = [math.exp(x / 0.7) if x >= logits[row].max() - 1.5 else 0.0 for x in logits[row].tolist()]
        expected.append(kept[labels[row]] / sum(kept) / math.exp(told[row]) if sampled[row] else 0.0)
    predicts = torch.tensor([[False, True, True, True, True], [True, False, True, True, False]])
    weights = ratio.weights(terms, tokens, predicts)
    before = [1.0, *(min(r, 2.0) for r in expected[:2]), 1.0, 1.0, 1.0, min(expected[5], 2.0)]
    assert weights[WEIGHT].tolist() == pytest.approx(before, rel=1e-12)
    for entries in ({}, weights):
        metrics = ratio.metrics(TokenLogits(logits), {**tokens, **entries})
        assert metrics[RATIO].tolist() == pytest.approx(expected, rel=1e-12)
        assert metrics[OUTSIDE].tolist() == [float(r > 2.0) for r in expected]
    assert 0.0 in [r for r, known in zip(expected, sampled, strict=True) if known] and max(expected) > 2
    assert ratio.metrics(TokenLogits(logits), {"labels": labels}) == {}
