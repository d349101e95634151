"""Scores with confidence intervals: every score is a function of sums over prompts, so a bootstrap only adds up anew.

P prompts, K columns of sums, R resamples. A resample draws P prompts with replacement (Efron & Tibshirani 1993, ch. 13:
percentile intervals); it is a row of counts, and the sums of all resamples are one product `[R, P] @ [P, K]`. Models
are compared under the same counts: the interval of a difference is that of paired prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..exceptions import ConfigurationError
from ..randomness import Purpose, Role, Stream
from .results import FEWEST, GapClosed, Score

Array = NDArray[np.float64]
Finish = Callable[[Array], Array]


def ratio(sums: Array) -> Array:
    """Divide column 0 by column 1: a mean; NaN of nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] != 0, sums[..., 0] / sums[..., 1], np.nan)


def exp_ratio(sums: Array) -> Array:
    """Return exp of a mean: perplexity from a sum of NLL and a number of tokens."""
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


@dataclass(frozen=True)
class Sums:
    """What a score needs of each prompt.

    Args:
        columns: `[P, K]`.
        finish: sums `[..., K]` to scores `[...]`.
        has_prompt_values: whether the score of a single prompt means something.
    """

    columns: Array
    finish: Finish = ratio
    has_prompt_values: bool = True

    @classmethod
    def of_means(cls, totals: Sequence[float], counts: Sequence[float], finish: Finish = ratio) -> Sums:
        """Keep totals and counts by prompt, of which the score is the overall mean."""
        return cls(np.stack([np.asarray(totals, float), np.asarray(counts, float)], axis=1), finish)

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def value(self) -> float:
        return float(self.finish(self.columns.sum(0)))

    def per_prompt(self) -> list[float | None]:
        """Return the score of each prompt alone; empty where that means nothing."""
        return [_finite(value) for value in self.finish(self.columns)] if self.has_prompt_values else []

    def resampled(self, counts: Array) -> Array:
        """Return scores `[R]` under counts `[R, P]`."""
        with np.errstate(invalid="ignore"):  # an infinite sum times a prompt that was not drawn
            return self.finish(counts @ self.columns)


def bootstrap_counts(prompts: int, resamples: int, seed: int) -> Array:
    """Count how often each of P prompts is drawn in each of R resamples, `[R, P]`; same arguments, same counts."""
    draw = Stream(seed, Role.SCORES, Purpose.BOOTSTRAP).at(prompts=prompts).numpy_generator()
    return draw.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(float)


def score(sums: Sums, counts: Array, confidence: float) -> Score:
    """Return the score over all prompts and its interval."""
    return _score(sums.value, sums.resampled(counts), confidence)


def difference(one: Sums, other: Sums, counts: Array, confidence: float) -> Score:
    """Return `one` − `other` on the same prompts, with the interval of paired prompts."""
    _require_same_prompts(one, other)
    return _score(one.value - other.value, one.resampled(counts) - other.resampled(counts), confidence)


def gap_closed(after: Sums, before: Sums, teacher: Sums, counts: Array, confidence: float) -> GapClosed:
    """Return (after − before) / (teacher − before): 1 where the student has reached its teacher, 0 where it stays.

    Returns:
        no value where teacher and student scored alike to begin with; `decided` tells whether the interval of the gap
        itself leaves out 0, on `FEWEST` prompts or more, without which a share of it says little.
    """
    _require_same_prompts(after, before, teacher)

    def share(after: Array, before: Array, teacher: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(teacher != before, (after - before) / (teacher - before), np.nan)

    values = [np.asarray(sums.value) for sums in (after, before, teacher)]
    resampled = [sums.resampled(counts) for sums in (after, before, teacher)]
    closed = _score(float(share(*values)), share(*resampled), confidence)
    gap = _score(0.0, resampled[2] - resampled[1], confidence)
    decided = gap.low is not None and gap.high is not None and (gap.low > 0 or gap.high < 0)
    decided = decided and closed.value is not None and len(after) >= FEWEST
    return GapClosed(closed.value, closed.low, closed.high, decided, len(after))


def _score(value: float, resampled: Array, confidence: float) -> Score:
    finite = resampled[np.isfinite(resampled)]
    if not len(finite) or not np.isfinite(value):
        return Score(_finite(value))
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Score(_finite(value), float(low), float(high))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _require_same_prompts(*sums: Sums) -> None:
    if len({len(score) for score in sums}) > 1:
        raise ConfigurationError(
            f"Got scores over {[len(score) for score in sums]} prompts; expected the same prompts for all models. "
            "Evaluate them together."
        )
