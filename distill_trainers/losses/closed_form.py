"""Divergences with their gradient in closed form: one pass over a block that fits in a cache, and no graph.

For D = sum over v of f(q_v, p_v) with q = softmax(z / tau), the student's logits z get

    dD/dz = q * (f' - sum of q * f') / tau,   f' = df/dq.

Each rule below computes D and tau * dD/dz of a block `[b, V]`. `divergences.py` has the same functions as one would
write them down; the tests hold the two against each other and against float64.

A rule is called with the logits of both sides divided by tau (which it leaves as they are), the gradient to fill in or
None, and four scratch tensors of the block's shape. It returns values `[b]`, which may be below 0 by rounding.
Probabilities of 0 are fine wherever the divergence is finite; where it is not, the value is huge or infinite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import divergences
from .divergences import Divergence, default_params
from .workspace import Workspace, empty_like, graph_is_kept, row_blocks

Rule = Callable[..., Tensor]
Scratch = Sequence[Tensor]
Into = Tensor | None  # a gradient to fill in, where it is wanted
_SCRATCH = 4


def _logps(logits: Tensor, out: Tensor) -> Tensor:
    """Log-probabilities, the lowest finite number for -inf: 0 times it is 0, and their differences stay finite."""
    return torch.log_softmax(logits, -1, out=out).clamp_(min=torch.finfo(out.dtype).min)


def _centred(weighted: Tensor, probs: Tensor, factor: float, out: Tensor) -> None:
    """out = factor * (weighted - probs * sum of weighted), for `weighted` = q * f'."""
    torch.addcmul(weighted, probs, weighted.sum(-1, keepdim=True), value=-1, out=out)
    if factor != 1.0:
        out.mul_(factor)


def _kl(log_ratio: Tensor, probs: Tensor, others: Tensor, scratch: Tensor) -> Tensor:
    """KL of `probs` from `others` as a sum of terms that do not cancel: see `divergences._kl`."""
    near = torch.clamp(log_ratio, max=1, out=scratch).expm1_().sub_(log_ratio).mul_(probs).sum(-1)
    return near + torch.sub(others, probs, alpha=math.e, out=scratch).clamp_(min=0).sum(-1)


def _forward_kl(student: Tensor, teacher: Tensor, gradient: Into, scratch: Scratch) -> Tensor:
    a, b, c, d = scratch
    return _kl_to_target(_logps(student, a), _logps(teacher, b), gradient, c, d)


def _kl_to_target(student_logps: Tensor, target_logps: Tensor, gradient: Into, a: Tensor, b: Tensor) -> Tensor:
    """KL(p || q) with gradient q - p; both log-probabilities are overwritten."""
    student_probs, target_probs = torch.exp(student_logps, out=a), torch.exp(target_logps, out=b)
    if gradient is not None:
        torch.sub(student_probs, target_probs, out=gradient)
    return _kl(student_logps.sub_(target_logps), target_probs, student_probs, target_logps)


def _reverse_kl(student: Tensor, teacher: Tensor, gradient: Into, scratch: Scratch) -> Tensor:
    a, b, c, d = scratch
    student_logps, teacher_logps = _logps(student, a), _logps(teacher, b)
    student_probs, teacher_probs = torch.exp(student_logps, out=c), torch.exp(teacher_logps, out=d)
    log_ratio = teacher_logps.sub_(student_logps)
    if gradient is not None:  # f' = log(q / p), up to a constant
        _centred(torch.mul(log_ratio, student_probs, out=a), student_probs, -1.0, out=gradient)
    return _kl(log_ratio, student_probs, teacher_probs, a)


def _both_probs(student: Tensor, teacher: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, p and p - q. The smallest normal number is added to both, so that they divide: it moves only what is 0."""
    tiny = torch.finfo(student.dtype).tiny
    student_probs = torch.softmax(student, -1, out=a).add_(tiny)
    teacher_probs = torch.softmax(teacher, -1, out=b).add_(tiny)
    return student_probs, teacher_probs, torch.sub(teacher_probs, student_probs, out=c)


def _log_towards(probs: Tensor, difference: Tensor, weight: float, out: Tensor) -> Tensor:
    """log((probs + weight * difference) / probs), exactly 0 where the difference is."""
    return torch.div(difference, probs, out=out).mul_(weight).log1p_()


def _jsd(student: Tensor, teacher: Tensor, gradient: Into, scratch: Scratch, beta: float) -> Tensor:
    if beta == 0:
        return _forward_kl(student, teacher, gradient, scratch)
    if beta == 1:
        return _reverse_kl(student, teacher, gradient, scratch)
    a, b, c, d = scratch
    q, p, difference = _both_probs(student, teacher, a, b, c)
    # f' = (1 - beta) * log(q / m): what flows through m sums to 0.
    weighted = _log_towards(q, difference, beta, out=d).mul_(q)
    if gradient is not None:
        _centred(weighted, q, beta - 1, out=gradient)
    teacher_to_mixture = _log_towards(p, difference, beta - 1, out=c).mul_(p).sum(-1)
    return -beta * teacher_to_mixture - (1 - beta) * weighted.sum(-1)


def _kl_towards(probs: Tensor, difference: Tensor, weight: float, a: Tensor, b: Tensor) -> Tensor:
    """KL of `probs` from probs + weight * difference, as sum of probs * (u - log(1 + u)); the log is left in `a`."""
    u = torch.div(difference, probs, out=b).mul_(weight)
    return u.sub_(torch.log1p(u, out=a)).mul_(probs).sum(-1)


def _skew_forward_kl(student: Tensor, teacher: Tensor, gradient: Into, scratch: Scratch, alpha: float) -> Tensor:
    if alpha == 0:
        return _forward_kl(student, teacher, gradient, scratch)
    a, b, c, d = scratch
    q, p, difference = _both_probs(student, teacher, a, b, c)
    if gradient is not None:
        # f' = -(1 - alpha) * p / m, and without a constant -(1 - alpha)^2 * (p - q) / m, which does not cancel.
        mixture = torch.add(q, difference, alpha=alpha, out=d)
        _centred(torch.div(difference, mixture, out=d).mul_(q), q, -((1 - alpha) ** 2), out=gradient)
    return _kl_towards(p, difference, alpha - 1, a, d)


def _skew_reverse_kl(student: Tensor, teacher: Tensor, gradient: Into, scratch: Scratch, alpha: float) -> Tensor:
    if alpha == 0:
        return _reverse_kl(student, teacher, gradient, scratch)
    a, b, c, d = scratch
    q, _, difference = _both_probs(student, teacher, a, b, c)
    value, log_mixture = _kl_towards(q, difference, 1 - alpha, b, d), b
    if gradient is not None:
        # f' = log(q / m) - alpha * q / m, and without a constant alpha * (1 - alpha) * (p - q) / m - log(m / q).
        mixture = torch.add(q, difference, alpha=1 - alpha, out=d)
        difference.div_(mixture).mul_(alpha * (1 - alpha))
        _centred(difference.sub_(log_mixture).mul_(q), q, 1.0, out=gradient)
    return value


def _total_variation(student: Tensor, teacher: Tensor, gradient: Into, scratch: Scratch) -> Tensor:
    a, b, c, d = scratch
    q, p = torch.softmax(student, -1, out=a), torch.softmax(teacher, -1, out=b)
    difference = torch.sub(q, p, out=c)
    if gradient is not None:  # f' = sign(q - p) / 2
        _centred(torch.sign(difference, out=d).mul_(q), q, 0.5, out=gradient)
    return 0.5 * difference.abs_().sum(-1)


def _lk(student: Tensor, teacher: Tensor, gradient: Into, scratch: Scratch, kl_weight: float) -> Tensor:
    if kl_weight == 1:
        return _forward_kl(student, teacher, gradient, scratch)
    if kl_weight == 0:
        return _total_variation(student, teacher, gradient, scratch)
    a, b, c, d = scratch
    student_logps, teacher_logps = _logps(student, a), _logps(teacher, b)
    q, p = torch.exp(student_logps, out=c), torch.exp(teacher_logps, out=d)
    kl = _kl(student_logps.sub_(teacher_logps), p, q, b)
    difference = torch.sub(q, p, out=a)
    if gradient is not None:
        _centred(torch.sign(difference, out=b).mul_(q), q, 0.5 * (1 - kl_weight), out=gradient)
        gradient.add_(difference, alpha=kl_weight)
    return kl_weight * kl + 0.5 * (1 - kl_weight) * difference.abs_().sum(-1)


def _taid(student: Tensor, teacher: Tensor, gradient: Into, scratch: Scratch, t: float) -> Tensor:
    a, b, c, d = scratch
    # Finite, so that 0 times them is 0; a softmax takes logits as well as log-probabilities.
    lowest = torch.finfo(student.dtype).min / 4
    torch.clamp(student, min=lowest, out=c)
    torch.clamp(teacher, min=lowest, out=d)
    target = _logps(torch.lerp(c, d, t, out=b), c)
    return _kl_to_target(_logps(student, a), target, gradient, b, d)


def _logit_mse(student: Tensor, teacher: Tensor, gradient: Into, scratch: Scratch) -> Tensor:
    masked = (student == -math.inf) | (teacher == -math.inf)  # has no distance
    count = (~masked).sum(-1, keepdim=True).clamp_(min=1).to(student.dtype)
    difference = torch.sub(student, teacher, out=scratch[0]).masked_fill_(masked, 0.0)
    difference.sub_(difference.sum(-1, keepdim=True) / count).masked_fill_(masked, 0.0)
    if gradient is not None:
        torch.mul(difference, 2 / count, out=gradient)
    return difference.square_().sum(-1) / count.squeeze(-1)


_RULES: dict[Any, Rule] = {
    divergences.forward_kl: _forward_kl,
    divergences.reverse_kl: _reverse_kl,
    divergences.jsd: _jsd,
    divergences.skew_forward_kl: _skew_forward_kl,
    divergences.skew_reverse_kl: _skew_reverse_kl,
    divergences.total_variation: _total_variation,
    divergences.lk: _lk,
    divergences.taid: _taid,
    divergences.logit_mse: _logit_mse,
}


def closed_form(divergence: Divergence) -> Rule | None:
    """Return the rule of one of `DIVERGENCES`, its parameters fixed as in `functools.partial`; None without one."""
    partial = divergence if isinstance(divergence, functools.partial) else functools.partial(divergence)
    rule = _RULES.get(partial.func)
    if rule is None or partial.args:
        return None
    return functools.partial(rule, **{**default_params(partial.func), **partial.keywords})


def name_of(rule: Rule) -> str:
    """Return the name in `DIVERGENCES` of what `closed_form` gave."""
    return next(function.__name__ for function, made_of in _RULES.items() if made_of is rule.func)  # type: ignore


def _evaluate(rule: Rule, student: Tensor, teacher: Tensor, temperature: float, gradient: Into) -> Tensor:
    """Values `[n]`, and tau times the gradient into `gradient` `[n, V]`."""
    values = student.new_empty(len(student))
    blocks = list(row_blocks(student))
    rows_of_block = min(blocks[0].stop, len(student)) if blocks else 0
    scratch = [torch.empty_like(student[:rows_of_block]) for _ in range(_SCRATCH + 2 * (temperature != 1.0))]
    for rows in blocks:
        student_rows, teacher_rows = student[rows], teacher[rows]
        free = [buffer[: len(student_rows)] for buffer in scratch]
        if temperature != 1.0:
            student_rows = torch.div(student_rows, temperature, out=free[_SCRATCH])
            teacher_rows = torch.div(teacher_rows, temperature, out=free[_SCRATCH + 1])
        values[rows] = rule(student_rows, teacher_rows, None if gradient is None else gradient[rows], free[:_SCRATCH])
    return values.clamp_(min=0)


class _ClosedForm(torch.autograd.Function):
    """Values of a rule, its gradient computed with them and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, rule: Rule, temperature: float, workspace: Workspace | None
    ) -> Tensor:
        gradient = empty_like(student, workspace)
        values = _evaluate(rule, student, teacher, temperature, gradient)
        ctx.temperature = temperature
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scale = (upstream / ctx.temperature)[:, None]
        return gradient * scale if graph_is_kept() else gradient.mul_(scale), None, None, None, None


def closed_form_divergence(
    rule: Rule, student: Tensor, teacher: Tensor, temperature: float, workspace: Workspace | None
) -> Tensor:
    """Return per-token values `[n]` of a rule on logits `[n, V]`, differentiable once in the student's.

    Args:
        workspace: where the gradient `[n, V]` is taken from; None allocates it.
    """
    teacher = teacher.detach().to(student.dtype)
    if student.requires_grad and torch.is_grad_enabled():
        return _ClosedForm.apply(student, teacher, rule, temperature, workspace)
    with torch.no_grad():
        return _evaluate(rule, student.detach(), teacher, temperature, None)
