"""Any per-token loss of `hidden @ head`, without ever holding the `[N, V]` logits of either model.

Tokens are taken in chunks. Each chunk is projected once per model, the loss and its gradient with respect to the
chunk's logits are computed, and the products with hidden states and head weight turn that into gradients of `[N, D]`
and `[V, D]` at once: the gradient is done when forward is, and backward only scales it (the idea of Liger's fused
losses, arXiv 2410.10989). Logits are at least float32 whatever the operands' dtype, also under autocast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..exceptions import ConfigurationError, VocabularyError
from ..signals import Head, HiddenStates, TeacherSignal, TokenLogits
from .divergences import resolve_divergence

DEFAULT_CHUNK_BYTES = 64 * 2**20

TermsFn = Callable[[TokenLogits, TokenLogits | None, dict[str, Tensor]], Mapping[str, Tensor]]


@functools.cache
def _multiplies_widely(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this device multiplies `dtype` matrices with a float32 result, none of it rounded to `dtype`."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    left = torch.zeros(16, 16, dtype=dtype, device=device_type)
    left[:, 0], left[:, 1] = 1.0, 2.0**-12
    try:
        torch.mm(left[:0], left, out_dtype=torch.float32)
        product = torch.mm(left, torch.ones_like(left), out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return bool((product == 1 + 2.0**-12).all())


@dataclass(frozen=True)
class _Projection:
    """Detached hidden states and head, in the dtype in which they are multiplied.

    `wide` is the dtype of logits and accumulators, at least float32. Operands keep a narrower dtype only where the
    device can multiply it into `wide`; otherwise both are converted here, once rather than in every chunk.
    """

    hidden: Tensor
    head: Head
    wide: torch.dtype

    @classmethod
    def of(cls, hidden: Tensor, head: Head) -> _Projection:
        common = torch.promote_types(hidden.dtype, head.weight.dtype)
        wide = torch.promote_types(common, torch.float32)
        same = hidden.dtype == head.weight.dtype
        operand = common if same and _multiplies_widely(hidden.device.type, common) else wide
        weight = head.weight.detach()[: head.num_ids].to(operand)
        bias = None if head.bias is None else head.bias.detach()
        return cls(hidden.detach().to(operand), replace(head, weight=weight, bias=bias), wide)

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """The product in `wide`, its operands in the dtype of hidden states and weight."""
        left, right = left.to(self.hidden.dtype), right.to(self.hidden.dtype)
        if self.hidden.dtype == self.wide:
            return left @ right
        return torch.mm(left, right, out_dtype=self.wide)

    def raw_logits(self, rows: slice) -> Tensor:
        """What the model's own functions on logits start from, `[n, V]`."""
        if self.hidden.dtype == self.wide:
            return self.head.project(self.hidden[rows])
        return self.matmul(self.hidden[rows], self.head.weight.T)


@dataclass
class _Gradients:
    """Accumulators of the gradients that are wanted, at least float32; None for those that are not."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def wanted_for(cls, hidden: Tensor, head: Head, wide: torch.dtype) -> _Gradients:
        def zeros(operand: Tensor | None) -> Tensor | None:
            if operand is None or not (operand.requires_grad and torch.is_grad_enabled()):
                return None
            return torch.zeros(operand.shape, dtype=wide, device=operand.device)

        return cls(zeros(hidden), zeros(head.weight), zeros(head.bias))

    def __bool__(self) -> bool:
        return any(each is not None for each in (self.hidden, self.weight, self.bias))

    def add(self, rows: slice, grad_raw: Tensor, student: _Projection) -> None:
        """Takes in the gradient `[n, V]` with respect to a chunk's raw logits."""
        ids = slice(0, student.head.num_ids)
        if self.hidden is not None:
            self.hidden[rows] = student.matmul(grad_raw, student.head.weight)
        if self.weight is not None and student.hidden.dtype == student.wide:
            self.weight[ids].addmm_(grad_raw.T, student.hidden[rows])
        elif self.weight is not None:
            self.weight[ids] += student.matmul(grad_raw.T, student.hidden[rows])
        if self.bias is not None:
            self.bias[ids] += grad_raw.sum(0)


class _WithGradients(torch.autograd.Function):
    """The identity on `total`, whose gradients with respect to the operands are already known."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: _Gradients, *operands: Tensor | None) -> Tensor:
        ctx.dtypes = [None if each is None else each.dtype for each in operands]
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled: list[Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            # Written straight into the operand's dtype: no second wide copy of a `[V, D]` gradient.
            out = None if gradient is None else torch.empty_like(gradient, dtype=dtype)
            scaled.append(None if gradient is None else torch.mul(gradient, upstream, out=out))
        return (None, None, *scaled)


def _weighted_total(terms: Mapping[str, Tensor], weights: Mapping[str, float], logits: Tensor) -> Tensor:
    for name, values in terms.items():
        if values.shape != logits.shape[:1]:
            raise ConfigurationError(
                f"Term {name!r} has shape {tuple(values.shape)}, expected one value per token, ({logits.shape[0]},). "
                "Reduce every axis but the first, and leave sums over tokens to the caller."
            )
    missing = [name for name in weights if name not in terms]
    if missing:
        raise ConfigurationError(
            f"Weights are given for {missing}, but the terms are {sorted(terms)}. Name existing terms only."
        )
    total = logits.new_zeros(())
    for name, weight in weights.items():
        total = total + weight * terms[name].sum()
    return total


def _check_operands(
    hidden: Tensor, head: Head, teacher: TeacherSignal | None, tokens: Mapping[str, Tensor], chunk_bytes: int
) -> None:
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ConfigurationError(
            f"Hidden states have shape {tuple(hidden.shape)} and the head {tuple(head.weight.shape)}, expected "
            "[N, D] and [V, D]. Select the trained positions first; is the head whole, not a shard?"
        )
    lengths = {name: len(values) for name, values in tokens.items()}
    if teacher is not None:
        lengths["teacher"] = len(teacher)
    wrong = {name: length for name, length in lengths.items() if length != len(hidden)}
    if wrong:
        raise ConfigurationError(
            f"The student has {len(hidden)} tokens, but others differ: {wrong}. Select all of them by one mask."
        )
    attached = [name for name, values in tokens.items() if values.requires_grad]
    if attached and torch.is_grad_enabled():
        raise ConfigurationError(
            f"Token tensors {attached} require gradients, but only hidden states and head receive any. Detach them."
        )
    if chunk_bytes <= 0:
        raise ConfigurationError(f"chunk_bytes is {chunk_bytes}, expected a positive number of bytes.")


def fused_linear_terms(
    student_hidden: Tensor,
    student_head: Head,
    teacher: TeacherSignal | None,
    terms_fn: TermsFn,
    tokens: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of weighted per-token terms of the logits, and the terms themselves.

    Args:
        student_hidden: `[N, D]`; N may be 0, the total is then 0 with zero gradients, still part of the graph.
        student_head: its weight may be any tensor with a graph behind it, such as W + BA.
        teacher: signal of the same N tokens, or None.
        terms_fn: pure function of a chunk's student logits, teacher logits and `tokens` to named values `[n]`. It may
            see a chunk of 0 tokens, runs without autocast, and nothing it closes over receives a gradient.
        tokens: further tensors `[N, ...]` that `terms_fn` reads, without gradient.
        weights: names of the terms that make up the total, and their factors. Other terms are metrics.
        chunk_bytes: size of one chunk of logits; a handful of temporaries of that size live at once. A chunk has at
            least one token.

    Returns:
        the scalar total, differentiable once with respect to hidden states, head weight and head bias, and the
        detached terms `[N]` by name.

    Raises:
        ConfigurationError: shapes or names that do not fit together.
    """
    _check_operands(student_hidden, student_head, teacher, tokens, chunk_bytes)
    student = _Projection.of(student_hidden, student_head)
    gradients = _Gradients.wanted_for(student_hidden, student_head, student.wide)
    teacher_chunk = _teacher_chunks(teacher)

    def run(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and terms of one chunk; what it holds of size `[n, V]` is gone when it returns."""
        raw = student.raw_logits(rows).requires_grad_(bool(gradients))
        with torch.set_grad_enabled(bool(gradients)):
            logits = TokenLogits(student.head.finish(raw))
            terms = terms_fn(logits, teacher_chunk(rows), {name: values[rows] for name, values in tokens.items()})
            chunk_total = _weighted_total(terms, weights, raw)
        if chunk_total.requires_grad:
            gradients.add(rows, torch.autograd.grad(chunk_total, raw)[0], student)
        return chunk_total.detach(), {name: values.detach() for name, values in terms.items()}

    step = max(1, chunk_bytes // (student.head.num_ids * student.wide.itemsize))
    # Without tokens one empty chunk still runs, for the names of the terms.
    starts = range(0, max(len(student_hidden), 1), step)
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        totals, terms = zip(*(run(slice(start, start + step)) for start in starts), strict=True)
    total = torch.stack(totals).sum().to(student.wide)  # a wider teacher does not widen the loss
    if gradients:
        total = _WithGradients.apply(total, gradients, student_hidden, student_head.weight, student_head.bias)
    return total, {name: torch.cat([each[name] for each in terms]) for name in terms[0]}


def _teacher_chunks(teacher: TeacherSignal | None) -> Callable[[slice], TokenLogits | None]:
    """What the teacher says about some rows, detached, its head converted once at most."""
    if teacher is None:
        return lambda rows: None
    if isinstance(teacher, HiddenStates):
        projection = _Projection.of(teacher.hidden, teacher.head)
        return lambda rows: TokenLogits(projection.head.finish(projection.raw_logits(rows)))
    return torch.no_grad()(teacher.chunk)


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "jsd",
    temperature: float = 1.0,
    tau_squared: bool = False,
    token_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    **divergence_params: float,
) -> Tensor:
    """Sum over tokens of a divergence between two models, from their hidden states.

    Args:
        student_hidden: `[N, Ds]`.
        student_weight: `[Vs, Ds]`.
        teacher_hidden: `[N, Dt]`, a constant.
        teacher_weight: `[Vt, Dt]`, a constant.
        divergence: a name in `DIVERGENCES`; its parameters follow as keywords.
        temperature: divides both models' logits.
        tau_squared: multiply by `temperature` squared, which keeps the gradient's size (Hinton, arXiv 1503.02531).
        token_weight: `[N]` factor per token, or None for 1.
        student_bias, teacher_bias, student_scale, teacher_scale, student_soft_cap, teacher_soft_cap: see `Head`.
        vocab_size: ids from here on are padding and leave the softmax of both sides.
        chunk_bytes: see `fused_linear_terms`.

    Returns:
        a scalar, at least float32. Divide it by the number of trained tokens with `reduction.token_mean`.

    Raises:
        ConfigurationError: an unknown divergence or parameter, or shapes that do not fit together.
        VocabularyError: the two softmaxes would have different numbers of ids.
    """
    function = resolve_divergence(divergence, **divergence_params)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigurationError(f"temperature is {temperature}, expected a positive finite number; 1.0 is neutral.")
    student_head = Head(student_weight, student_bias, student_scale, student_soft_cap, vocab_size)
    teacher_head = Head(teacher_weight, teacher_bias, teacher_scale, teacher_soft_cap, vocab_size)
    if student_head.num_ids != teacher_head.num_ids:
        raise VocabularyError(
            f"The student's softmax has {student_head.num_ids} ids and the teacher's {teacher_head.num_ids}. "
            "If both use one tokenizer and only padding differs, pass vocab_size=len(tokenizer)."
        )

    def terms(student: TokenLogits, teacher: TokenLogits | None, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        assert teacher is not None  # given below
        values = function(student.logps(temperature), teacher.logps(temperature))
        return {divergence: values * chunk["weight"] if chunk else values}

    total, _ = fused_linear_terms(
        student_hidden,
        student_head,
        HiddenStates(teacher_hidden, teacher_head),
        terms,
        tokens={} if token_weight is None else {"weight": token_weight},
        weights={divergence: temperature**2 if tau_squared else 1.0},
        chunk_bytes=chunk_bytes,
    )
    return total
