"""Losses on a few ids per token: of given tokens, of a teacher's top k with the rest in one bucket, of its draws.

Nothing of the teacher's has the size of the vocabulary, and of the student's only the logits and their gradient: the
normaliser is computed block by block, the log-probabilities of the ids are gathered, and what a loss makes of those
few numbers is left to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..signals import SMALLEST_TAIL, TokenLogits, TokenSampled, TokenTopK
from .divergences import Divergence
from .workspace import Workspace, empty_like, row_blocks


def _by_block(function: Callable[[slice], Tensor], logits: Tensor) -> Tensor:
    values = logits.new_empty(len(logits))
    for rows in row_blocks(logits):
        values[rows] = function(rows)
    return values


def _scaled_softmax(logits: Tensor, normaliser: Tensor, factor: Tensor, workspace: Workspace | None) -> Tensor:
    """softmax(logits) * factor, `[n, V]`, from log-normaliser and factor `[n]`."""
    out = empty_like(logits, workspace)
    for rows in row_blocks(logits):
        torch.sub(logits[rows], normaliser[rows, None], out=out[rows]).exp_().mul_(factor[rows, None])
    return out


class _GatheredLogps(torch.autograd.Function):
    """Log-probabilities `[n, K]` of `ids` `[n, K]`, which may repeat."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, workspace: Workspace | None) -> Tensor:
        normaliser = _by_block(lambda rows: logits[rows].logsumexp(-1), logits)
        ctx.save_for_backward(logits, ids, normaliser)
        ctx.workspace = workspace
        return logits.gather(-1, ids) - normaliser[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, normaliser = ctx.saved_tensors
        gradient = _scaled_softmax(logits, normaliser, -upstream.sum(-1), ctx.workspace)
        return gradient.scatter_add_(-1, ids, upstream), None, None


class _Buckets(torch.autograd.Function):
    """Log-probabilities `[n, K + 1]` of `ids` `[n, K]`, all different, and of all other ids together."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, workspace: Workspace | None) -> Tensor:
        def others(rows: slice) -> Tensor:
            # Not 1 minus the rest: a tail of 1e-6 would have one digit left in float32.
            return logits[rows].scatter(-1, ids[rows], -math.inf).logsumexp(-1)

        scores = torch.cat([logits.gather(-1, ids), _by_block(others, logits)[:, None]], dim=-1)
        normaliser = scores.logsumexp(-1)
        logps = scores - normaliser[:, None]
        ctx.save_for_backward(logits, ids, normaliser, logps)
        ctx.workspace = workspace
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, normaliser, logps = ctx.saved_tensors
        total, tail, tail_logps = upstream.sum(-1, keepdim=True), upstream[:, -1:], logps[:, -1:]
        # A bucket passes its gradient on to its ids in proportion to their share of it. Of a tail so small that its
        # inverse overflows, the shares come from its own normaliser, beside which `total` times its mass is nothing.
        none, small = tail_logps == -math.inf, tail_logps < -60
        share = torch.where(small, 0.0, tail * torch.exp(-tail_logps.clamp(min=-60)))
        factor = torch.where(small & ~none, tail, share - total).squeeze(-1)
        shift = torch.where(small & ~none, tail_logps, 0.0).squeeze(-1)
        gradient = _scaled_softmax(logits, normaliser + shift, factor, ctx.workspace)
        by_id = upstream[:, :-1] - total * logps[:, :-1].exp()
        return gradient.scatter_(-1, ids, by_id), None, None


def token_logps(student: TokenLogits, ids: Tensor) -> Tensor:
    """Return log-probabilities of given ids at temperature 1.

    Args:
        student: logits `[n, V]`; they receive gradients.
        ids: `[n]`, or `[n, K]` for several per token.

    Returns:
        values of the shape of `ids`.
    """
    several = ids if ids.ndim == 2 else ids[:, None]
    return _GatheredLogps.apply(student.logits, several, student.workspace).view(ids.shape)


@torch.no_grad()
def token_entropy(student: TokenLogits) -> Tensor:
    """Return the entropy `[n]` of each token's distribution, in nats at temperature 1, without a gradient."""
    return torch.special.entr(student.logps().exp()).sum(-1)


def other_logps(student: TokenLogits, ids: Tensor) -> Tensor:
    """Return log(1 − q) of given ids `[n]`, summed over the others: value and gradient stay exact where q is near 1.

    Returns:
        values `[n]`.
    """
    others = student.logits.scatter(-1, ids[:, None], -math.inf)
    return others.logsumexp(-1) - student.logits.logsumexp(-1)


def top_k_divergence(divergence: Divergence, student: TokenLogits, teacher: TokenTopK) -> Tensor:
    """Compute the divergence between K + 1 buckets: K ids of the teacher's choice, and everything else.

    An f-divergence never grows when ids are put into one bucket: the value lies between 0 and that of the whole
    distributions, grows with K, and equals it at K = V. (Without the tail the K ids would have to be normalised anew,
    whose minimum is not the teacher but one that puts no mass elsewhere.) A tail of 0 counts as the least that float32
    can tell, `SMALLEST_TAIL`: that of a confident teacher is often rounded to 0. Where K = V there is no tail.

    Returns:
        values `[n]`.
    """
    if teacher.ids.shape[-1] == student.logits.shape[-1]:
        return divergence(token_logps(student, teacher.ids), F.log_softmax(teacher.logps, dim=-1))
    tail_logps = torch.where(teacher.tail_logps == -math.inf, SMALLEST_TAIL, teacher.tail_logps)
    buckets = replace(teacher, tail_logps=tail_logps).buckets()
    return divergence(_Buckets.apply(student.logits, teacher.ids, student.workspace), buckets)


def sampled_forward_kl(student: TokenLogits, teacher: TokenSampled) -> Tensor:
    """Estimate KL(p || q) without bias from draws of p: sum of c_i / N * (log p_i - log q_i) (arXiv 2503.16870).

    The expectation over draws is the forward KL, and that of its gradient q - c / N is q - p. Single values may be
    negative; where p = q they are 0.

    Returns:
        values `[n]`.
    """
    gap = teacher.logps - token_logps(student, teacher.ids)
    return (teacher.weights * gap.masked_fill(teacher.weights == 0, 0.0)).sum(-1)
