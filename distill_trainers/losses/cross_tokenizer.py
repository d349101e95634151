"""Losses between two models of different tokenizers: on chunks of text, on next bytes, on tokens that both have.

Shapes: N tokens, n tokens of a chunk of logits, V and V' ids of student and teacher, K chunks of text that both
tokenisations share (`data/alignment.py`), S ids whose tokens are the same bytes. The teacher is a constant.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .divergences import Divergence, _without_negative_rounding, forward_kl, resolve_divergence
from .workspace import row_blocks

NUM_BUCKETS = 258  # the 256 first bytes, the end of a text, all other special tokens

# The least -log P and the least mass of a bucket that count: below them float32 has no digits, or no numbers.
_LEAST_REST = 2.0**-24
_LEAST_MASS = 2.0**-100


def chunk_sums(token_logps: Tensor, chunks: Tensor, num_chunks: int) -> Tensor:
    """Sum log-probabilities of tokens by chunk: the chunk's log-probability, given the text before it.

    Args:
        token_logps: `[N]`.
        chunks: int64 `[N]`, the chunk that each token is part of; -1 for none.

    Returns:
        `[K]`. With every token in a chunk they add up to the log-probability of the sequence.
    """
    within = chunks >= 0
    sums = token_logps.new_zeros(num_chunks + 1)  # the last one takes what is part of none
    return sums.index_add(0, chunks.where(within, num_chunks), token_logps)[:num_chunks]


def chunks_of_ends(ends: Tensor) -> Tensor:
    """Return the chunk of each token, int64 `[N]`, from the index behind each chunk's last token, `[K]`."""
    return torch.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))


def alm(student_logps: Tensor, teacher_logps: Tensor, temperature: float = 1.0) -> Tensor:
    """Compare how likely both find a chunk of text (ALM, arXiv 2503.20083): a divergence of two events.

    With P = exp(log-probability / τ) it is τ times the KL of the teacher's (P, 1 − P) from the student's. The factor τ
    keeps its size as τ grows, to the limit (b − a) + a·log(a/b) with a, b the two negative log-probabilities of teacher
    and student, whose gradient in the student's log-probability is a/b − 1. At τ = 1 and a chunk of one token it is at
    most the forward KL of the next token, and equal to it at V = 2.

    Args:
        student_logps, teacher_logps: log-probabilities `[K]` of the same chunks.
        temperature: τ, `math.inf` for the limit.

    Returns:
        values `[K]` in nats, 0 where both agree.
    """
    a, b = (_at_least(-logps, _LEAST_REST) for logps in (teacher_logps.detach(), student_logps))
    if math.isinf(temperature):
        ratio = (b - a) / a
        # Near 1 log(b / a) keeps its digits as log1p; far from it, where b / a - 1 rounds to -1, as a difference.
        near = torch.log1p(ratio.clamp(min=-0.5))
        log_ratio = torch.where(ratio < -0.5, b.log() - a.log(), near)
        return _without_negative_rounding(a * (ratio - log_ratio))
    events = [torch.stack([-x / temperature, torch.log(-torch.expm1(-x / temperature))], -1) for x in (b, a)]
    return temperature * forward_kl(*events)


def _at_least(values: Tensor, least: float) -> Tensor:
    """The values, smaller ones raised to the least; the gradient passes as if they were not."""
    return values + (values.detach().clamp(min=least) - values.detach())


class _Buckets(torch.autograd.Function):
    """Log-probabilities `[n, 258]` of buckets of ids; the gradient of a bucket goes to its ids by their share."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, buckets: Tensor) -> Tensor:
        normalisers = logits.new_empty(len(logits))
        masses = logits.new_zeros(len(logits), NUM_BUCKETS)
        for rows in row_blocks(logits):
            normalisers[rows] = logits[rows].logsumexp(-1)
            probs = torch.sub(logits[rows], normalisers[rows, None]).exp_()
            masses[rows].scatter_add_(-1, buckets.expand_as(probs), probs)
        ctx.save_for_backward(logits, buckets, normalisers, masses)
        return masses.clamp(min=_LEAST_MASS).log_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        logits, buckets, normalisers, masses = ctx.saved_tensors
        upstream = upstream.masked_fill(masses < _LEAST_MASS, 0.0)
        factors = upstream / masses.clamp(min=_LEAST_MASS) - upstream.sum(-1, keepdim=True)
        gradient = torch.empty_like(logits)
        for rows in row_blocks(logits):
            torch.sub(logits[rows], normalisers[rows, None], out=gradient[rows]).exp_()
            gradient[rows] *= factors[rows].index_select(-1, buckets)
        return gradient, None


def bucket_logps(logits: Tensor, first_bytes: Tensor) -> Tensor:
    """Return how likely each next byte is: P(b) = sum of q(v) over the tokens v that begin with byte b.

    The end of a text is a bucket of its own, and so are all other special tokens together: the buckets hold the whole
    mass, so that no divergence between them exceeds that of the tokens (data processing).

    Args:
        logits: `[n, V]`; they receive gradients, once.
        first_bytes: bucket of each id, int64 `[V]` (`TokenBytes.first_bytes`, `common_buckets`).

    Returns:
        log-probabilities `[n, 258]`; a bucket without mass has a large negative number, and no gradient.
    """
    return _Buckets.apply(logits, first_bytes)


def common_buckets(student_first: Tensor, teacher_first: Tensor) -> tuple[Tensor, Tensor]:
    """Put bytes with which no token of one side begins into the last bucket of both: only one could say them.

    Args:
        student_first, teacher_first: `[V]` and `[V']`, buckets of the ids of both.
    """
    said = [torch.bincount(first, minlength=NUM_BUCKETS) > 0 for first in (student_first, teacher_first)]
    target = torch.arange(NUM_BUCKETS, device=student_first.device)
    target[~(said[0] & said[1])] = NUM_BUCKETS - 1
    return target[student_first], target[teacher_first]


def next_byte(divergence: str | Divergence, student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Compute a divergence `[n]` between two distributions of the next byte, `[n, 258]` (see `bucket_logps`)."""
    function = resolve_divergence(divergence) if isinstance(divergence, str) else divergence
    return function(student_logps, teacher_logps.detach())


def exact_overlap(
    divergence: str | Divergence, student_logps: Tensor, teacher_logps: Tensor, student_ids: Tensor, teacher_ids: Tensor
) -> Tensor:
    """Compute a divergence over the tokens that both have, with everything else in one bucket on either side.

    Without that bucket the two would be no distributions, and their "divergence" could fall below 0.

    Args:
        student_logps, teacher_logps: log-probabilities `[n, V]` and `[n, V']` of the next token.
        student_ids, teacher_ids: `[S]`, ids of the same tokens (`shared_ids`).

    Returns:
        values `[n]`.
    """
    function = resolve_divergence(divergence) if isinstance(divergence, str) else divergence
    sides = (student_logps, student_ids), (teacher_logps.detach(), teacher_ids)
    return function(*(_with_tail(logps, ids) for logps, ids in sides))


def _with_tail(logps: Tensor, ids: Tensor) -> Tensor:
    others = torch.ones(logps.shape[-1], dtype=torch.bool, device=logps.device).index_fill(0, ids, False)
    rest = logps[:, others].logsumexp(-1, keepdim=True) if others.any() else logps.new_full((len(logps), 1), -math.inf)
    return torch.cat([logps.index_select(-1, ids), rest.clamp(min=math.log(_LEAST_MASS))], -1)


def uld(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Compare sorted probabilities: Σ |sort p − sort q| (ULD, arXiv 2402.12030), the smaller vocabulary padded by 0.

    It is 0 for any permutation of q, so it says nothing about which token is likely: for comparison.

    Args:
        student_logps, teacher_logps: log-probabilities `[n, V]` and `[n, V']`.

    Returns:
        values `[n]`, from 0 to 2.
    """
    student, teacher = (
        logps.exp().sort(-1, descending=True).values for logps in (student_logps, teacher_logps.detach())
    )
    width = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (F.pad(probs, (0, width - probs.shape[-1])) for probs in (student, teacher))
    return (teacher - student).abs().sum(-1)
