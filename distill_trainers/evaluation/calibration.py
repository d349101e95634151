"""Whether a model's probability of its likeliest next token is the rate at which that token is the right one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .intervals import Array, Sums
from .results import CalibrationBin


def _bins_of(confidence: ArrayLike, bins: int) -> NDArray[np.int64]:
    """Bin of each token: m covers ((m − 1)/bins, m/bins]."""
    return np.clip(np.ceil(np.asarray(confidence, float) * bins) - 1, 0, bins - 1).astype(int)


def calibration_sums(confidence: Sequence[Sequence[float]], correct: Sequence[Sequence[float]], bins: int) -> Sums:
    """Sum up ECE = Σ |B_m| / N · |accuracy − confidence| over equal bins (Guo et al., arXiv 1706.04599, eq. 3).

    Args:
        confidence: probability of the likeliest next token, by prompt and token.
        correct: 1 where that token is the given one.

    Returns:
        K = bins + 1 columns: Σ (correct − confidence) of each bin, and the tokens.
    """
    columns = np.zeros((len(confidence), bins + 1))
    for prompt, (sure, right) in enumerate(zip(confidence, correct, strict=True)):
        np.add.at(columns[prompt], _bins_of(sure, bins), np.asarray(right, float) - np.asarray(sure, float))
        columns[prompt, bins] = len(sure)

    def finish(sums: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(sums[..., :-1]).sum(-1) / sums[..., -1]

    return Sums(columns, finish, has_prompt_values=False)


def calibration_bins(
    confidence: Sequence[Sequence[float]], correct: Sequence[Sequence[float]], bins: int
) -> list[CalibrationBin]:
    """Return the bins of a reliability diagram: tokens, mean confidence and accuracy of each bin."""
    sure = np.array([value for row in confidence for value in row], float)
    right = np.array([value for row in correct for value in row], float)
    bin_of, diagram = _bins_of(sure, bins), []
    for m in range(bins):
        inside = bin_of == m
        tokens = int(inside.sum())
        means = (float(sure[inside].mean()), float(right[inside].mean())) if tokens else (None, None)
        diagram.append(CalibrationBin(m / bins, (m + 1) / bins, tokens, *means))
    return diagram
