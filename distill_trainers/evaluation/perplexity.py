"""Perplexity: exp of the mean negative log-likelihood over all tokens of a text, its end-of-text token included."""

from __future__ import annotations

from collections.abc import Sequence

from .intervals import Sums, exp_ratio


def perplexity_sums(nll: Sequence[Sequence[float]]) -> Sums:
    """Sum up a mean over all tokens, not over prompts.

    Args:
        nll: −log q(y) of every token, in nats, by prompt.
    """
    return Sums.of_means([sum(row) for row in nll], [len(row) for row in nll], exp_ratio)
