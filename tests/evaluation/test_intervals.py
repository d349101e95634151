"""Scores and intervals from sums over prompts: values by hand, coverage by simulation, pairs, shares of a gap."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distill_trainers.evaluation.intervals import (
    Sums,
    bootstrap_counts,
    difference,
    exp_ratio,
    gap_closed,
    score,
)
from distill_trainers.evaluation.scores import perplexity_sums
from distill_trainers.evaluation.tables import share_of_gap
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.reporting.result import _verdict


def means(values):
    return Sums.of_means(values, [1.0] * len(values))


def test_a_mean_is_over_all_tokens_and_not_over_prompts():
    sums = perplexity_sums([[1.0, 2.0, 3.0], [0.0]])
    assert sums.value == pytest.approx(math.exp(6 / 4))
    assert sums.per_prompt() == [pytest.approx(math.exp(2)), 1.0]


def test_an_infinite_or_missing_score_is_none_in_results():
    counts = bootstrap_counts(2, 50, 0)
    assert score(perplexity_sums([[math.inf], [1.0]]), counts, 0.95).value is None
    assert score(perplexity_sums([[], []]), counts, 0.95).value is None
    assert perplexity_sums([[], [1.0]]).per_prompt()[0] is None


def test_resamples_are_those_of_prompts_and_repeat():
    counts = bootstrap_counts(7, 300, 0)
    assert counts.shape == (300, 7) and (counts.sum(1) == 7).all()
    assert (counts == bootstrap_counts(7, 300, 0)).all() and (counts != bootstrap_counts(7, 300, 1)).any()
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0])
    row = counts[3].astype(int)
    drawn = np.repeat(values, row)
    assert means(values).resampled(counts)[3] == pytest.approx(drawn.mean())


def test_one_prompt_has_no_spread():
    found = score(means([0.5]), bootstrap_counts(1, 100, 0), 0.95)
    assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)


def test_intervals_cover_what_they_say():
    """Means of 60 exponential draws: 90 % intervals hold the true mean in about 90 of 100 data sets.

    In 88 for so few draws; the bounds are 5 standard errors from there, and so in the next test.
    """
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(1000):
        found = score(means(draw.exponential(2.0, 60)), bootstrap_counts(60, 400, trial), 0.90)
        covered += found.low <= 2.0 <= found.high
    assert 0.83 <= covered / 1000 <= 0.95


def test_the_interval_of_a_ratio_covers_too():
    """Tokens per prompt differ; the truth is exp of the mean over tokens."""
    draw = np.random.default_rng(1)
    covered = 0
    for trial in range(600):
        lengths = draw.integers(1, 30, 80)
        totals = np.array([draw.gamma(2.0, 0.5, n).sum() for n in lengths])
        sums = Sums.of_means(totals, lengths, exp_ratio)
        found = score(sums, bootstrap_counts(80, 300, trial), 0.95)
        covered += found.low <= math.e <= found.high
    assert 0.875 <= covered / 600 <= 0.99


def test_a_difference_is_one_of_paired_prompts():
    """Prompts differ by far more than models do: pairs see the difference, unpaired intervals would not."""
    draw = np.random.default_rng(2)
    hard = draw.normal(0, 10, 50)
    one, other = means(hard + 0.5 + draw.normal(0, 0.1, 50)), means(hard)
    counts = bootstrap_counts(50, 500, 0)
    found = difference(one, other, counts, 0.95)
    assert 0.4 < found.low < found.value < found.high < 0.6
    alone = score(one, counts, 0.95)
    assert alone.high - alone.low > 3


def test_the_gap_that_was_closed():
    before, teacher = means([1.0, 2.0, 3.0, 2.0] * 5), means([5.0, 6.0, 7.0, 6.0] * 5)
    counts = bootstrap_counts(20, 200, 0)
    halfway = means([3.0, 4.0, 5.0, 4.0] * 5)
    for after, expected in ((before, 0.0), (halfway, 0.5), (teacher, 1.0)):
        found = gap_closed(after, before, teacher, counts, 0.95)
        assert (found.value, found.low, found.high) == pytest.approx((expected,) * 3)
        assert found.decided


def test_few_prompts_have_no_verdict():
    before, after, teacher = (means([value] * 19) for value in (1.0, 2.0, 3.0))
    found = gap_closed(after, before, teacher, bootstrap_counts(19, 50, 0), 0.95)
    assert found.value == 0.5 and found.is_of_few and not found.decided
    assert share_of_gap(found) == "(50 %)"
    assert _verdict(found).startswith("19 prompts are too few for a verdict, which takes 20")


def test_the_gap_is_the_same_share_whichever_direction_is_better():
    """A loss that falls from 4 to 3 with its teacher at 2 has closed half of the gap, as an accuracy would."""
    found = gap_closed(means([3.0] * 5), means([4.0] * 5), means([2.0] * 5), bootstrap_counts(5, 50, 0), 0.95)
    assert found.value == 0.5


def test_no_gap_no_share():
    same = means([1.0, 2.0, 3.0])
    found = gap_closed(same, same, same, bootstrap_counts(3, 100, 0), 0.95)
    assert found.value is None and not found.decided
    noise = gap_closed(
        means([1.5] * 3), means([1.0, 2.0, 3.0]), means([3.1, 2.0, 1.0]), bootstrap_counts(3, 200, 0), 0.95
    )
    assert noise.value is not None and not noise.decided


def test_models_on_other_prompts_cannot_be_compared():
    with pytest.raises(ConfigurationError, match=r"\[2, 3\] prompts"):
        difference(means([1.0, 2.0]), means([1.0, 2.0, 3.0]), bootstrap_counts(2, 10, 0), 0.95)
