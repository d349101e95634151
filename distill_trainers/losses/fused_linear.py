"""Any per-token loss of `hidden @ head`, without ever holding the `[N, V]` logits of either model.

Tokens are taken in chunks. Each chunk is projected once per model, the loss and its gradient with respect to the
chunk's logits are computed, and the products with hidden states and head weight turn that into gradients of `[N, D]`
and `[V, D]` at once: the gradient is done when forward is, and backward only scales it (the idea of Liger's fused
losses, arXiv 2410.10989). Logits are at least float32 whatever the operands' dtype, also under autocast.

What is left beside the matrix products is kept small: chunks share their buffers, divergences with a closed form
(`closed_form.py`) take one pass in blocks that fit in a cache, and nothing needs autograd but what a method adds. On
CUDA these are Triton kernels (`kernels.py`), which finish the logits as they read them (`raw_logits.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..exceptions import ConfigurationError, VocabularyError
from ..signals import Aligned, Composed, Head, HiddenStates, Routed, TeacherSignal, TokenLogits, TokenSignal
from . import kernels
from .divergences import resolve_divergence
from .per_token import token_divergence
from .raw_logits import RawLogits
from .reduction import weighted_total
from .workspace import Workspace, chunk_bytes_of, graph_is_kept, row_blocks

TermsFn = Callable[[TokenLogits, TokenSignal | None, dict[str, Tensor]], Mapping[str, Tensor]]


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


@functools.cache
def _accumulates_widely(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this device adds such a product onto a float32 matrix in place."""
    left = torch.zeros(16, 16, dtype=dtype, device=device_type)
    left[:, 0], left[:, 1] = 1.0, 2.0**-12
    total = torch.full((16, 16), math.nan, device=device_type)
    try:
        for beta in (0, 1):
            torch.addmm(total, left, torch.ones_like(left), beta=beta, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 2 + 2.0**-11).all())


def _add_product(total: Tensor, left: Tensor, right: Tensor, onto_nothing: bool) -> None:
    """Add `left @ right`, of a narrower dtype, to `total`, or overwrite it; best without a second such matrix."""
    if _accumulates_widely(total.device.type, left.dtype):
        torch.addmm(total, left, right, beta=0 if onto_nothing else 1, out_dtype=total.dtype, out=total)
    elif onto_nothing:
        total.copy_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))


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

    @property
    def is_wide(self) -> bool:
        """Whether products of the operands come out in `wide` by themselves."""
        return self.hidden.dtype == self.wide

    def products(self, rows: slice, workspace: Workspace) -> Tensor:
        """Hidden states times weight `[n, V]`, in a buffer of the workspace where the device can write them there."""
        hidden, transposed = self.hidden[rows], self.head.weight.T
        if self.is_wide:
            shape = (len(hidden), self.head.num_ids)
            return torch.matmul(hidden, transposed, out=workspace.take(shape, self.wide, hidden.device))
        return torch.mm(hidden, transposed, out_dtype=self.wide)

    def logits(self, rows: slice, workspace: Workspace) -> Tensor:
        """The model's logits `[n, V]`, finished in place."""
        logits = self.products(rows, workspace)
        for block in row_blocks(logits):
            self.head.finish_(logits[block])
        return logits

    def token_logits(self, rows: slice, workspace: Workspace, requires_grad: bool = False) -> TokenLogits:
        """The same for losses; left unfinished where kernels can do that while they read."""
        if kernels.may_run(self.hidden.device):
            return RawLogits(self.products(rows, workspace).requires_grad_(requires_grad), self.head, workspace)
        return TokenLogits(self.logits(rows, workspace).requires_grad_(requires_grad), workspace)

    def before_finish(self, gradient: Tensor, logits: Tensor, workspace: Workspace) -> Tensor:
        """The gradient with respect to the bare product, from that with respect to the logits."""
        if self.head.soft_cap is None and self.head.scale == 1.0:
            return gradient
        # Autograd may have given an expanded tensor, or one that somebody else still holds.
        gradient = gradient if workspace.lent(gradient) else gradient.clone(memory_format=torch.contiguous_format)
        for block in row_blocks(gradient):
            self.head.unfinish_(gradient[block], logits[block])
        return gradient


@dataclass
class _Gradients:
    """Accumulators of the gradients that are wanted, at least float32; None for those that are not."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    weight_is_empty: bool = True  # the first product overwrites it: filling it with zeros would be a pass for nothing

    @classmethod
    def wanted_for(cls, hidden: Tensor, head: Head, wide: torch.dtype) -> _Gradients:
        def make(operand: Tensor | None, of: Callable[..., Tensor]) -> Tensor | None:
            if operand is None or not (operand.requires_grad and torch.is_grad_enabled()):
                return None
            return of(operand.shape, dtype=wide, device=operand.device)

        return cls(make(hidden, torch.zeros), make(head.weight, torch.empty), make(head.bias, torch.zeros))

    def __bool__(self) -> bool:
        return any(gradient is not None for gradient in (self.hidden, self.weight, self.bias))

    def add(self, rows: slice, gradient: Tensor, student: _Projection) -> None:
        """Takes in the gradient `[n, V]` with respect to a chunk's bare product."""
        ids = slice(0, student.head.num_ids)
        operand = gradient.to(student.hidden.dtype)
        hidden, weight = student.hidden[rows], student.head.weight
        if student.is_wide:
            if self.hidden is not None:
                torch.matmul(operand, weight, out=self.hidden[rows])
            if self.weight is not None:
                self.weight[ids].addmm_(operand.T, hidden, beta=0 if self.weight_is_empty else 1)
        else:
            if self.hidden is not None:
                self.hidden[rows] = torch.mm(operand, weight, out_dtype=student.wide)
            if self.weight is not None:
                _add_product(self.weight[ids], operand.T, hidden, onto_nothing=self.weight_is_empty)
        if self.bias is not None:
            self.bias[ids] += gradient.sum(0)
        self.weight_is_empty = False

    def complete(self, num_ids: int) -> None:
        """Every chunk has been added: what none of them reached is 0."""
        if self.weight is not None:
            self.weight[0 if self.weight_is_empty else num_ids :].zero_()


class _WithGradients(torch.autograd.Function):
    """The identity on `total`, whose gradients with respect to the operands are already known."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: _Gradients, *operands: Tensor | None) -> Tensor:
        ctx.dtypes = [None if operand is None else operand.dtype for operand in operands]
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        runs_again = graph_is_kept()
        scaled: list[Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is None:
                scaled.append(None)
            elif gradient.dtype == dtype and not runs_again:
                scaled.append(gradient.mul_(upstream))
            else:
                # Written straight into the operand's dtype: no second wide copy of a `[V, D]` gradient.
                scaled.append(torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype)))
        return (None, None, *scaled)


def _product_gradient(total: Tensor, logits: TokenLogits, student: _Projection, workspace: Workspace) -> Tensor:
    """The gradient `[n, V]` of a chunk's total with respect to the bare product; the logits are lost with it."""
    if isinstance(logits, RawLogits):
        logits.release(total)
        return torch.autograd.grad(total, logits.products)[0]
    gradient = torch.autograd.grad(total, logits.logits)[0]
    return student.before_finish(gradient, logits.logits.detach(), workspace)


def _check_terms(terms: Mapping[str, Tensor], weights: Mapping[str, float], logits: TokenLogits) -> None:
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


def _check_operands(
    hidden: Tensor, head: Head, teacher: TeacherSignal | None, tokens: Mapping[str, Tensor], chunk_bytes: int | None
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
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ConfigurationError(f"chunk_bytes is {chunk_bytes}, expected a positive number of bytes.")


def fused_linear_terms(
    student_hidden: Tensor,
    student_head: Head,
    teacher: TeacherSignal | None,
    terms_fn: TermsFn,
    tokens: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum over tokens of weighted per-token terms of the logits, and the terms themselves.

    Args:
        student_hidden: `[N, D]`; N may be 0, the total is then 0 with zero gradients, still part of the graph.
        student_head: its weight may be any tensor with a graph behind it, such as W + BA.
        teacher: signal of the same N tokens, or None.
        terms_fn: pure function of a chunk's student logits, of what the teacher says about it (None without a teacher)
            and of `tokens` to named values `[n]`. It may see a chunk of 0 tokens, runs without autocast, and nothing
            it closes over receives a gradient. It must not keep logits: their memory is the next chunk's.
        tokens: further tensors `[N, ...]` that `terms_fn` reads, without gradient.
        weights: names of the terms that make up the total, and their factors. Other terms are metrics.
        chunk_bytes: size of one chunk of logits, of which three live at once (student, teacher, gradient; with Triton's
            kernels the gradient takes the student's place), and a handful more where a term has no closed form. A
            chunk has at least one token. None: 32 MiB on a CPU and 1024 elsewhere.

    Returns:
        the scalar total, differentiable once with respect to hidden states, head weight and head bias, and the
        detached terms `[N]` by name.

    Raises:
        ConfigurationError: shapes or names that do not fit together.
    """
    _check_operands(student_hidden, student_head, teacher, tokens, chunk_bytes)
    student = _Projection.of(student_hidden, student_head)
    gradients = _Gradients.wanted_for(student_hidden, student_head, student.wide)
    workspace = Workspace()
    teacher_chunk = teacher_chunks(teacher, workspace)

    def run(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and terms of one chunk; what it holds of size `[n, V]` is free when it returns."""
        logits = student.token_logits(rows, workspace, requires_grad=bool(gradients))
        with torch.set_grad_enabled(bool(gradients)):
            chunk_tokens = {name: values[rows] for name, values in tokens.items()}
            terms = terms_fn(logits, teacher_chunk(rows), chunk_tokens)
            _check_terms(terms, weights, logits)
            start = torch.zeros((), dtype=student.wide, device=student_hidden.device)
            chunk_total = weighted_total(terms, weights, start=start)
        copies = {name: values.detach().clone() for name, values in terms.items()}  # a term may be a view of the logits
        if chunk_total.requires_grad:
            gradients.add(rows, _product_gradient(chunk_total, logits, student, workspace), student)
        workspace.reset()
        return chunk_total.detach(), copies

    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        totals, terms = zip(*(run(rows) for rows in _chunks_of(student, chunk_bytes)), strict=True)
    total = torch.stack(totals).sum().to(student.wide)  # a wider teacher does not widen the loss
    if gradients:
        gradients.complete(student.head.num_ids)
        total = _WithGradients.apply(total, gradients, student_hidden, student_head.weight, student_head.bias)
    return total, {name: torch.cat([chunk[name] for chunk in terms]) for name in terms[0]}


def _chunks(tokens: int, at_most: int) -> list[slice]:
    """The fewest chunks of at most so many tokens, about equal: the products of a small last one would cost more.

    Without tokens there is one empty chunk, for the names of the terms.
    """
    count = max(1, math.ceil(tokens / at_most))
    step = max(1, math.ceil(tokens / count))
    return [slice(start, start + step) for start in range(0, max(tokens, 1), step)]


def _chunks_of(student: _Projection, chunk_bytes: int | None) -> list[slice]:
    at_most = chunk_bytes or chunk_bytes_of(None, student.hidden.device.type)
    return _chunks(len(student.hidden), max(1, at_most // (student.head.num_ids * student.wide.itemsize)))


def teacher_chunks(teacher: TeacherSignal | None, workspace: Workspace) -> Callable[[slice], TokenSignal | None]:
    """Give what the teacher says about some rows, detached, its head converted once at most."""
    if teacher is None:
        return lambda rows: None
    if isinstance(teacher, HiddenStates):
        projection = _Projection.of(teacher.hidden, teacher.head)
        return torch.no_grad()(lambda rows: projection.token_logits(rows, workspace))
    if isinstance(teacher, Aligned):
        return teacher_chunks(teacher.at_places(), workspace)
    if isinstance(teacher, Routed | Composed):
        readers: list[Any] = [None if part is None else teacher_chunks(part, workspace) for part in teacher.parts]
        return torch.no_grad()(lambda rows: teacher.join(rows, readers, workspace))
    return torch.no_grad()(teacher.chunk)


def signal_chunks(
    signal: TeacherSignal, ids: Tensor, chunk_bytes: int | None
) -> Iterator[tuple[slice, TokenSignal | None]]:
    """Yield what a teacher says about tokens `[N]`, some rows at a time, in memory that the next ones take."""
    workspace = Workspace()
    at_most = chunk_bytes or chunk_bytes_of(None, ids.device.type)
    read = teacher_chunks(signal, workspace)
    for rows in _chunks(len(ids), max(1, at_most // (4 * signal.width))):
        yield rows, read(rows)
        workspace.reset()


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
    chunk_bytes: int | None = None,
    **divergence_params: float,
) -> Tensor:
    """Sum a divergence between two models over tokens, from their hidden states.

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

    def terms(student: TokenLogits, teacher: TokenSignal | None, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        assert teacher is not None  # given below
        values = token_divergence(function, student, teacher, temperature)
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
