"""The closed-form divergences in Triton: each pass over two chunks of logits is one kernel. Needs the package `triton`.

`value_kernel` reads the logits of both sides twice: for their normalisers, then for the value and for the sum that
centres the gradient. `gradient_kernel` reads them once more and writes the gradient, times a factor for each row. Bias,
scale and soft cap of either head are applied as the raw products are read, so that finished logits are never written.
How many bytes that saves is counted in docs/maths.md; `kernels.py` decides when these are used.

The formulas are those of `closed_form.py`: with q the student and p the teacher, both at the temperature,

    tau * dD/dz = slope - q * (sum of slope),   slope = q * df/dq.

Every value is a sum of terms that are not negative, exactly 0 where p = q. Triton has neither expm1, log1p nor tanh on
all of its backends: near 0 they are series here, relative error below 1e-7.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = {  # by the names of `DIVERGENCES`
    "forward_kl": 0,
    "reverse_kl": 1,
    "jsd": 2,
    "skew_forward_kl": 3,
    "skew_reverse_kl": 4,
    "total_variation": 5,
    "taid": 6,
    "logit_mse": 7,
    "lk": 8,
}
_FORWARD_KL: tl.constexpr = tl.constexpr(KINDS["forward_kl"])
_REVERSE_KL: tl.constexpr = tl.constexpr(KINDS["reverse_kl"])
_JSD: tl.constexpr = tl.constexpr(KINDS["jsd"])
_SKEW_FORWARD_KL: tl.constexpr = tl.constexpr(KINDS["skew_forward_kl"])
_TOTAL_VARIATION: tl.constexpr = tl.constexpr(KINDS["total_variation"])
_TAID: tl.constexpr = tl.constexpr(KINDS["taid"])
_LOGIT_MSE: tl.constexpr = tl.constexpr(KINDS["logit_mse"])
_LK: tl.constexpr = tl.constexpr(KINDS["lk"])
_LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
_TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)

# Ids that a program works on at once: 8 for each thread. ptxas gives all of them at most 64 registers and spills none.
BLOCK = 2048
WARPS = 8


@triton.jit
def _exp_series(x):
    """exp(x) - 1 - x for |x| < 1/2."""
    high = 1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x * (1 / 362880)))
    return x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * high))))


@triton.jit
def _log_series(u, s):
    """u - log(1 + u) for |u| < 1/2, with s = u / (2 + u): log(1 + u) = 2 artanh(s)."""
    t = s * s
    high = 1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15)))
    return u * s - 2 * s * t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * high)))


@triton.jit
def _log1p(u):
    return tl.where(tl.abs(u) < 0.5, u - _log_series(u, u / (2 + u)), tl.log(1 + u))


@triton.jit
def _above_log1p(u):
    """u - log(1 + u), which is not negative."""
    return tl.where(tl.abs(u) < 0.5, _log_series(u, u / (2 + u)), u - tl.log(1 + u))


@triton.jit
def _tanh(x):
    y = -2 * tl.abs(x)
    expm1 = tl.where(y > -0.5, y + _exp_series(y), tl.exp(y) - 1)
    size = -expm1 / (2 + expm1)
    return tl.where(x < 0, -size, size)


@triton.jit
def _finite(x):
    """-inf becomes the lowest finite number, whose differences are finite; NaN stays."""
    return tl.where(x < _LOWEST, _LOWEST, x)


@triton.jit
def _finished(product, bias, ids, mask, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Logits from bare products, as `Head.finish` makes them; -inf beyond the vocabulary."""
    z = tl.load(product + ids, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + ids, mask=mask, other=0.0).to(tl.float32)
    z *= SCALE
    if CAP is not None:
        z = CAP * _tanh(z / CAP)
    return tl.where(mask, z, float("-inf"))


@triton.jit
def _target(z, y, weight, KIND: tl.constexpr):
    """Logits of what the student is compared with: the teacher's, or for TAID those between both."""
    if KIND != _TAID:
        return y
    a, b = tl.where(z < _LOWEST / 4, _LOWEST / 4, z), tl.where(y < _LOWEST / 4, _LOWEST / 4, y)
    return tl.where(weight < 0.5, a + weight * (b - a), b - (1 - weight) * (b - a))


@triton.jit
def _kl_term(probs, others, log_ratio):
    """A term of KL of `probs` from `others`, with log_ratio = log(others / probs): see `divergences._kl`."""
    near = tl.where(tl.abs(log_ratio) < 0.5, _exp_series(log_ratio), tl.exp(log_ratio) - 1 - log_ratio)
    return tl.where(log_ratio < 1, probs * near, (others - probs) - probs * log_ratio)


@triton.jit
def _element(z, y, first, second, weight, KIND: tl.constexpr):
    """Terms of the value, slope, and q, of some ids; `first` and `second` are what `value_kernel` kept of the row."""
    if KIND == _LOGIT_MSE:  # first: the mean difference, second: how many ids have one
        masked = (z == float("-inf")) | (y == float("-inf"))
        difference = tl.where(masked, 0.0, (z - y) - first)
        return difference * difference / second, 2 * difference / second, tl.zeros_like(z)
    log_q, log_p = _finite(z - first), _finite(y - second)
    q, p = tl.exp(log_q), tl.exp(log_p)
    if KIND == _FORWARD_KL or KIND == _TAID:
        return _kl_term(p, q, log_q - log_p), q - p, tl.zeros_like(q)
    if KIND == _REVERSE_KL:
        return _kl_term(q, p, log_p - log_q), q * (log_q - log_p), q
    if KIND == _TOTAL_VARIATION:
        sign = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
        return 0.5 * tl.abs(q - p), q * sign, q
    if KIND == _LK:  # of the KL the slopes add up to 0, so that the sum centres those of the distance
        half = 0.5 * (1 - weight)
        sign = tl.where(q > p, half, tl.where(q < p, -half, 0.0))
        value = weight * _kl_term(p, q, log_q - log_p) + half * tl.abs(q - p)
        return value, weight * (q - p) + q * sign, q
    q, p = q + _TINY, p + _TINY  # so that they divide: it moves only what is 0
    difference = p - q
    if KIND == _JSD:
        towards_p, towards_q = weight * (difference / q), (weight - 1) * (difference / p)
        value = weight * p * _above_log1p(towards_q) + (1 - weight) * q * _above_log1p(towards_p)
        return value, (weight - 1) * q * _log1p(towards_p), q
    if KIND == _SKEW_FORWARD_KL:
        value = p * _above_log1p((weight - 1) * (difference / p))
        return value, -(1 - weight) * (1 - weight) * q * (difference / (q + weight * difference)), q
    towards_p = (1 - weight) * (difference / q)
    mixture = q + (1 - weight) * difference
    slope = weight * (1 - weight) * (difference / mixture) - _log1p(towards_p)
    return q * _above_log1p(towards_p), q * slope, q


@triton.jit
def _with_block(top, mass, z):
    """Largest logit so far, and the sum of exponentials below it, with those of one more block."""
    new = tl.maximum(top, tl.max(z, 0))
    return new, mass * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)


@triton.jit(do_not_specialize=["rows"])
def value_kernel(
    student,
    teacher,
    bias,
    teacher_bias,
    values,
    kept,
    stride,
    teacher_stride,
    rows,
    vocab,
    temperature,
    weight,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's value; `kept` `[3, rows]` gets what its gradient needs: two numbers for `_element`, the slopes' sum."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    # From the lowest finite number: -inf would make NaN of a block of nothing but -inf.
    nothing = tl.full([], 0.0, tl.float32)
    top, mass, teacher_top, teacher_mass = nothing + _LOWEST, nothing, nothing + _LOWEST, nothing
    difference, count = nothing, nothing
    for start in range(0, vocab, BLOCK):
        ids = start + lanes
        z = _finished(student, bias, ids, ids < vocab, SCALE, CAP) / temperature
        y = _finished(teacher, teacher_bias, ids, ids < vocab, TEACHER_SCALE, TEACHER_CAP) / temperature
        y = _target(z, y, weight, KIND)
        if KIND == _LOGIT_MSE:
            masked = (z == float("-inf")) | (y == float("-inf"))
            difference += tl.sum(tl.where(masked, 0.0, z - y), 0)
            count += tl.sum(tl.where(masked, 0.0, 1.0), 0)
        else:
            top, mass = _with_block(top, mass, z)
            teacher_top, teacher_mass = _with_block(teacher_top, teacher_mass, y)
    if KIND == _LOGIT_MSE:
        second = tl.where(count < 1, 1.0, count)
        first = difference / second
    else:
        first, second = top + tl.log(mass), teacher_top + tl.log(teacher_mass)
    value, slopes = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + lanes
        z = _finished(student, bias, ids, ids < vocab, SCALE, CAP) / temperature
        y = _finished(teacher, teacher_bias, ids, ids < vocab, TEACHER_SCALE, TEACHER_CAP) / temperature
        y = _target(z, y, weight, KIND)
        term, slope, _ = _element(z, y, first, second, weight, KIND)
        value += term
        slopes += slope
    total = tl.sum(value, 0)
    tl.store(values + row, tl.where(total < 0, 0.0, total))
    tl.store(kept + row, first)
    tl.store(kept + rows + row, second)
    tl.store(kept + 2 * rows + row, tl.sum(slopes, 0))


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    student,
    teacher,
    bias,
    teacher_bias,
    kept,
    factors,
    gradient,
    gradient_stride,
    stride,
    teacher_stride,
    rows,
    vocab,
    temperature,
    weight,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one row's block with respect to the student's products, times the row's factor.

    It may overwrite the products: each thread has read its own before it writes.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * teacher_stride
    start, lanes = tl.program_id(1) * BLOCK, tl.arange(0, BLOCK)
    ids = start + lanes
    z = _finished(student, bias, ids, ids < vocab, SCALE, CAP) / temperature
    y = _finished(teacher, teacher_bias, ids, ids < vocab, TEACHER_SCALE, TEACHER_CAP) / temperature
    y = _target(z, y, weight, KIND)
    first, second, slopes = tl.load(kept + row), tl.load(kept + rows + row), tl.load(kept + 2 * rows + row)
    _, slope, q = _element(z, y, first, second, weight, KIND)
    if KIND != _FORWARD_KL and KIND != _TAID and KIND != _LOGIT_MSE:  # whose slopes add up to 0
        slope -= q * slopes
    found = slope * (tl.load(factors + row) / temperature)
    if CAP is not None:
        bent = z * temperature / CAP
        found *= 1 - bent * bent
    tl.store(gradient + row * gradient_stride + ids, found * SCALE, mask=ids < vocab)


@dataclass(frozen=True)
class Form:
    """A divergence as the kernels know it: which, and its one parameter (0 where it has none)."""

    kind: int
    weight: float = 0.0


@dataclass(frozen=True)
class Products:
    """Bare products `[n, V]` of one model, ids side by side, and what its head does to them (see `Head`)."""

    values: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True)
class Launch:
    """Both kernels on one chunk."""

    form: Form
    student: Products
    teacher: Products
    temperature: float

    def values(self) -> tuple[Tensor, Tensor]:
        """Return values `[n]`, and what `gradient` needs, `[3, n]`, both float32."""
        rows, vocab = self.student.values.shape
        values, kept = (self.student.values.new_empty(size, dtype=torch.float32) for size in ((rows,), (3, rows)))
        if rows and vocab:
            with _current(values.device):
                value_kernel[(rows,)](*self._sides(), values, kept, *self._numbers(), **self._constants())
        return values, kept

    def gradient(self, kept: Tensor, factors: Tensor, out: Tensor) -> Tensor:
        """Fill `out` `[n, V]` with the gradient of the sum of factors `[n]` times values; it may be the products."""
        rows, vocab = self.student.values.shape
        if rows and vocab:
            grid = (rows, triton.cdiv(vocab, BLOCK))
            with _current(out.device):
                arguments = (*self._sides(), kept, factors.contiguous(), out, out.stride(0), *self._numbers())
                gradient_kernel[grid](*arguments, **self._constants())
        return out

    def _sides(self) -> tuple[Tensor | None, ...]:
        return self.student.values, self.teacher.values, self.student.bias, self.teacher.bias

    def _numbers(self) -> tuple[float, ...]:
        mine, theirs = self.student.values, self.teacher.values
        return mine.stride(0), theirs.stride(0), *mine.shape, float(self.temperature), float(self.form.weight)

    def _constants(self) -> dict[str, Any]:
        return {
            "KIND": self.form.kind,
            "SCALE": float(self.student.scale),
            "CAP": self.student.soft_cap,
            "TEACHER_SCALE": float(self.teacher.scale),
            "TEACHER_CAP": self.teacher.soft_cap,
            "BLOCK": BLOCK,
            "num_warps": WARPS,
        }


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current GPU, which need not be the one that holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
