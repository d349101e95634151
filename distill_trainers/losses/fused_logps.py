"""Log-probabilities of given tokens from `hidden @ head`, and losses that are functions of those of whole rows.

A preference loss is no sum over tokens: its gradient at a token depends on the sums of two rows. So the tokens'
log-probabilities `[N]` come first, as a differentiable tensor; autograd takes it from there with numbers as few as
tokens, and comes back with one number per token. Neither way are logits `[N, V]` held: forward computes them chunk by
chunk, and backward once more. Such a loss costs four matrix products with the head where a per-token loss costs three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..exceptions import ConfigurationError
from ..signals import Composed, Head, HiddenStates, Routed, TeacherSignal, TokenLogits, TokenLogprobs, TokenSignal
from .fused_linear import (
    TermsFn,
    _chunks_of,
    _Gradients,
    _Projection,
    fused_linear_terms,
    signal_chunks,
)
from .reduction import weighted_total
from .sparse import token_logps
from .workspace import Workspace, row_blocks

RowTermsFn = Callable[[Tensor, Tensor | None, Mapping[str, Tensor]], Mapping[str, Tensor]]


def _logps_and_normalisers(student: _Projection, ids: Tensor, chunk_bytes: int | None) -> tuple[Tensor, Tensor]:
    workspace = Workspace()
    logps = torch.empty(len(ids), dtype=student.wide, device=ids.device)
    normalisers = torch.empty_like(logps)
    for rows in _chunks_of(student, chunk_bytes):
        logits = student.logits(rows, workspace)
        for block in row_blocks(logits):
            normalisers[rows][block] = logits[block].logsumexp(-1)
        logps[rows] = logits.gather(-1, ids[rows, None]).squeeze(-1) - normalisers[rows]
        workspace.reset()
    return logps, normalisers


class _FusedLogps(torch.autograd.Function):
    """Log-probabilities `[N]`; backward computes each chunk's logits anew."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, ids: Tensor, chunk_bytes: int | None
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logps, normalisers = _logps_and_normalisers(_Projection.of(hidden, head), ids, chunk_bytes)
        # The head's tensors go through autograd alone: under ZeRO-3 and FSDP2 they are whole again by backward.
        ctx.save_for_backward(hidden, weight, bias, ids, normalisers)
        ctx.settings = {"scale": head.scale, "soft_cap": head.soft_cap, "vocab_size": head.vocab_size}
        ctx.chunk_bytes = chunk_bytes
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, normalisers = ctx.saved_tensors
        student = _Projection.of(hidden, Head(weight, bias, **ctx.settings))

        def accumulator(place: int, of: Any) -> Tensor | None:
            operand = (hidden, weight, bias)[place]
            needed = ctx.needs_input_grad[place]
            return of(operand.shape, dtype=student.wide, device=operand.device) if needed else None

        gradients = _Gradients(accumulator(0, torch.zeros), accumulator(1, torch.empty), accumulator(2, torch.zeros))
        workspace = Workspace()
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks_of(student, ctx.chunk_bytes):
                logits, factor = student.logits(rows, workspace), upstream[rows].to(student.wide)
                gradient = workspace.take(logits.shape, logits.dtype, logits.device)
                for block in row_blocks(logits):  # upstream * (one-hot - softmax)
                    torch.sub(logits[block], normalisers[rows][block, None], out=gradient[block])
                    gradient[block].exp_().mul_(-factor[block, None])
                gradient.scatter_add_(-1, ids[rows, None], factor[:, None])
                gradients.add(rows, student.before_finish(gradient, logits, workspace), student)
                workspace.reset()
        gradients.complete(student.head.num_ids)
        known = (gradients.hidden, gradients.weight, gradients.bias)
        narrow = (None if g is None else g.to(o.dtype) for g, o in zip(known, (hidden, weight, bias), strict=True))
        return (*narrow, None, None, None)


def fused_token_logps(hidden: Tensor, head: Head, ids: Tensor, *, chunk_bytes: int | None = None) -> Tensor:
    """Compute log-probabilities of given tokens at temperature 1, without `[N, V]` logits, forward or backward.

    Args:
        hidden: `[N, D]`; N may be 0.
        head: its weight may be any tensor with a graph behind it, such as W + BA.
        ids: `[N]`, below `head.num_ids`.
        chunk_bytes: size of one chunk of logits, see `fused_linear_terms`; two live at once in backward.

    Returns:
        values `[N]`, at least float32, differentiable once with respect to hidden states, head weight and bias.
    """
    operands = [hidden, head.weight, *([] if head.bias is None else [head.bias])]
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        return _FusedLogps.apply(hidden, head.weight, head.bias, head, ids, chunk_bytes)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return _logps_and_normalisers(_Projection.of(hidden, head), ids, chunk_bytes)[0]


@torch.no_grad()
def signal_token_logps(signal: TeacherSignal, ids: Tensor, *, chunk_bytes: int | None = None) -> Tensor:
    """Return a teacher's log-probabilities `[N]` of given tokens `[N]` at temperature 1, chunk by chunk.

    Raises:
        ConfigurationError: a sparse signal, which holds some ids only.
    """
    if isinstance(signal, HiddenStates):
        return fused_token_logps(signal.hidden, signal.head, ids, chunk_bytes=chunk_bytes)
    if isinstance(signal, Routed | Composed):
        return _logps_of_several(signal, ids, chunk_bytes)
    return _told_logps(signal.chunk(slice(None)), ids)


def _logps_of_several(signal: Routed | Composed, ids: Tensor, chunk_bytes: int | None) -> Tensor:
    with torch.autocast(ids.device.type, enabled=False):
        chunks = signal_chunks(signal, ids, chunk_bytes)
        return torch.cat([_told_logps(told, ids[rows]).clone() for rows, told in chunks])


def _told_logps(target: TokenSignal | None, ids: Tensor) -> Tensor:
    if isinstance(target, TokenLogprobs):
        return target.values
    if not isinstance(target, TokenLogits):
        raise ConfigurationError(
            f"Got a teacher's {type(target).__name__}; expected distributions or log-probabilities of the tokens. "
            "Use a live teacher."
        )
    return token_logps(target, ids)


def fused_row_terms(
    student_hidden: Tensor,
    student_head: Head,
    teacher: TeacherSignal | None,
    terms_fn: TermsFn,
    row_terms_fn: RowTermsFn,
    tokens: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    *,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Do as `fused_linear_terms`, with further terms of the log-probabilities of whole rows.

    Args:
        terms_fn: see `fused_linear_terms`; not called where a gradient is wanted and no weight names a term of it.
        row_terms_fn: function of the log-probabilities `[N]` of `tokens["labels"]`, of the teacher's (None without
            one) and of `tokens`, to named values `[N]`; the first argument receives gradients. Values whose name starts
            with `token_` are no terms: `terms_fn` gets them with its tokens.
        weights: names of the terms of either function that make up the total, and their factors.

    Returns:
        the scalar total and the detached terms `[N]` by name.
    """
    logps = fused_token_logps(student_hidden, student_head, tokens["labels"], chunk_bytes=chunk_bytes)
    known = None if teacher is None else signal_token_logps(teacher, tokens["labels"], chunk_bytes=chunk_bytes)
    total, terms, tokens, other_weights = _row_terms(logps, known, row_terms_fn, tokens, weights)
    if teacher is not None and (other_weights or not torch.is_grad_enabled()):
        chunked, others = fused_linear_terms(
            student_hidden, student_head, teacher, terms_fn, tokens, other_weights, chunk_bytes=chunk_bytes
        )
        total, terms = total + chunked, {**terms, **others}
    return total, terms


def row_terms_of_logits(
    logits: Tensor,
    teacher: TeacherSignal | None,
    terms_fn: TermsFn,
    row_terms_fn: RowTermsFn,
    tokens: Mapping[str, Tensor],
    weights: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Do as `fused_row_terms` from the student's own logits `[N, V]`, for heads that cannot be fused."""
    logps = token_logps(TokenLogits(logits), tokens["labels"])
    known = None if teacher is None else signal_token_logps(teacher, tokens["labels"])
    total, terms, tokens, other_weights = _row_terms(logps, known, row_terms_fn, tokens, weights)
    if teacher is not None:
        values = terms_fn(TokenLogits(logits), teacher.chunk(slice(None)), dict(tokens))
        total = weighted_total(values, other_weights, start=total)
        terms |= {name: values_of.detach() for name, values_of in values.items()}
    return total, terms


def _row_terms(
    logps: Tensor,
    teacher_logps: Tensor | None,
    row_terms_fn: RowTermsFn,
    tokens: Mapping[str, Tensor],
    weights: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Total and terms of the rows; the tokens with what the rows say about them; the weights of other terms."""
    values = row_terms_fn(logps, teacher_logps, tokens)
    entries = {name: value.detach() for name, value in values.items() if name.startswith("token_")}
    of_rows = {name: weight for name, weight in weights.items() if name in values}
    total = weighted_total(values, of_rows, start=logps.sum() * 0.0)  # part of the graph whatever the weights
    terms = {name: value.detach() for name, value in values.items() if name not in entries}
    other_weights = {name: weight for name, weight in weights.items() if name not in values}
    return total, terms, {**tokens, **entries}, other_weights
