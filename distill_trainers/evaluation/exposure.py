"""Exposure bias: how much faster errors add up on a model's own text than on its teacher's (Arora et al., 2204.01171).

With d_t = KL(p‖q) at position t:

    R(l) = Σ_{t≤l} E_{y<t ~ q} d_t      on text that the student sampled
    E(l) = Σ_{t≤l} E_{y<t ~ p} d_t      on text that the teacher sampled, l · ε(l)
    ExAccErr(l) = 100 · (R(l) − E(l)) / E(l)

Completions end, so each expectation is the mean over those that have a token t, and l goes as far as enough of them do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .intervals import Array, Sums

Values = Sequence[Sequence[float]]  # by prompt and position


def covered_length(texts: Sequence[Values], share: float = 0.5) -> int:
    """Return the largest l that this share of the completions of every set reach; at least 1."""
    lengths = [sorted(map(len, text), reverse=True) for text in texts]
    return max(1, min(reached[max(0, int(np.ceil(share * len(reached))) - 1)] for reached in lengths))


def by_position(values: Values, length: int) -> tuple[Array, Array]:
    """Return values and their presence, `[P, length]` each; 0 behind the end of a completion."""
    padded, present = np.zeros((len(values), length)), np.zeros((len(values), length))
    for prompt, row in enumerate(values):
        row_values = np.asarray(row[:length], float)
        padded[prompt, : len(row_values)] = row_values
        present[prompt, : len(row_values)] = 1
    return padded, present


def _accumulated(sums: Array, length: int) -> tuple[Array, Array]:
    """R(l) and E(l) for l = 1 … length, `[..., length]`."""
    student, teacher = sums[..., : 2 * length], sums[..., 2 * length :]

    def added(part: Array) -> Array:
        totals, counts = part[..., :length], part[..., length:]
        return np.cumsum(np.where(counts > 0, totals / np.maximum(counts, 1), 0.0), axis=-1)

    return added(student), added(teacher)


def _excess(sums: Array, length: int) -> Array:
    """ExAccErr(l) in per cent, `[..., length]`; 0 where nothing adds up on either text."""
    on_own, on_teachers = _accumulated(sums, length)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(on_own == on_teachers, 0.0, 100 * (on_own - on_teachers) / on_teachers)


def exposure_sums(student_text: Values, teacher_text: Values, length: int) -> Sums:
    """Compute ExAccErr at `length`, from KL(p‖q) by prompt and position on both texts of the same prompts."""
    columns = np.concatenate([*by_position(student_text, length), *by_position(teacher_text, length)], axis=1)
    return Sums(columns, lambda sums: _excess(sums, length)[..., -1], has_prompt_values=False)


def exposure_curve(sums: Sums) -> list[float | None]:
    """Compute ExAccErr(l) for l = 1 … `length` of `exposure_sums`."""
    length = sums.columns.shape[1] // 4
    curve = _excess(sums.columns.sum(0), length)
    return [float(value) if np.isfinite(value) else None for value in curve]
