"""Divergences between two next-token distributions, per token.

Every function takes `student_logps` and `teacher_logps`, log-probabilities `[..., V]` of the same ids at the same
temperature, and returns values `[...]`. With p the teacher and q the student, all but `logit_mse` (squared logits),
`total_variation` (a probability) and `lk` (a mixture) are in nats; all are zero at p = q and never negative. The
teacher is a constant: gradients reach `student_logps` only. Ids to which the teacher gives probability exactly 0
(log-probability -inf) are fine wherever the divergence is finite.

Every KL is a sum of terms that are not negative (`_kl`), so equality gives exactly 0 and small values keep their
digits; what rounding leaves below 0 is removed from the value without touching the gradient.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..exceptions import ConfigurationError
from ..settings import shown

Divergence = Callable[[Tensor, Tensor], Tensor]


def _kl(probs: Tensor, log_ratio: Tensor, others: Tensor) -> Tensor:
    """KL of `probs` from `others`, with their `log_ratio` log(others / probs), as sum of probs * (r - 1 - log r).

    The terms r - 1 add up to 0, and with them no term is negative. Without them the terms cancel each other, and in
    float32 a divergence below 1e-6 would be nothing but rounding. Where r is above e, `others` gives r itself, since
    `probs` may be 0.
    """
    log_ratio = log_ratio.masked_fill(probs == 0, 0.0)  # 0 times infinity is 0
    near = probs * (torch.expm1(log_ratio.clamp(max=1)) - log_ratio)
    return _without_negative_rounding((near + torch.relu(others - math.e * probs)).sum(-1))


def _without_negative_rounding(values: Tensor) -> Tensor:
    # Subtracting the detached negative part gives 0 like a clamp, yet leaves the gradient what it was.
    return values - values.detach().clamp(max=0)


def _finite_constant(logps: Tensor) -> Tensor:
    """Detached, with the lowest finite number for -inf: its exponential is 0 all the same."""
    return logps.detach().clamp(min=torch.finfo(logps.dtype).min)


def _log_mixture_ratio(log_ratio: Tensor, weight: float | Tensor) -> Tensor:
    """log(1 + weight * (exp(log_ratio) - 1)): log of a mixture over its other component; 0 where `log_ratio` is 0.

    The cap keeps the exponential finite. Above it the other component has a probability below 1e-38 (float32), and
    that factor multiplies the result in every divergence here.
    """
    cap = math.log(torch.finfo(log_ratio.dtype).max) - 1
    return torch.log1p(weight * torch.expm1(log_ratio.clamp(max=cap)))


def forward_kl(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Compute KL(p || q): covers every mode of the teacher (Hinton et al., arXiv 1503.02531, for soft targets)."""
    teacher_logps = teacher_logps.detach()
    return _kl(teacher_logps.exp(), student_logps - teacher_logps, student_logps.exp())


def reverse_kl(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Compute KL(q || p), with the student's entropy: without it the minimiser would be a one-hot at argmax p.

    The step-wise loss of MiniLLM (arXiv 2306.08543, eq. 5, "Single"). Infinite where q > 0 = p.
    """
    teacher_logps = teacher_logps.detach()
    return _kl(student_logps.exp(), teacher_logps - student_logps, teacher_logps.exp())


def skew_forward_kl(student_logps: Tensor, teacher_logps: Tensor, *, alpha: float | Tensor = 0.1) -> Tensor:
    """Compute KL(p || alpha p + (1 - alpha) q), at most -ln alpha (DistiLLM, arXiv 2402.03898, eq. 3).

    `alpha` = 0 is forward KL. The smaller `alpha`, the less float32 can tell it from 0: keep it above 1e-4. A tensor
    `[..., 1]` gives each token its own.
    """
    if not isinstance(alpha, Tensor) and alpha == 0:
        return forward_kl(student_logps, teacher_logps)
    teacher_logps = _finite_constant(teacher_logps)
    probs = teacher_logps.exp()
    log_mixture = _log_mixture_ratio(student_logps - teacher_logps, 1 - alpha)
    return _kl(probs, log_mixture, alpha * probs + (1 - alpha) * student_logps.exp())


def skew_reverse_kl(student_logps: Tensor, teacher_logps: Tensor, *, alpha: float | Tensor = 0.1) -> Tensor:
    """Compute KL(q || (1 - alpha) p + alpha q), at most -ln alpha (DistiLLM, arXiv 2402.03898, section 3.1).

    The student inside the mixture is live. `alpha` = 0 is reverse KL; see `skew_forward_kl` for small values.
    """
    if not isinstance(alpha, Tensor) and alpha == 0:
        return reverse_kl(student_logps, teacher_logps)
    teacher_logps, probs = _finite_constant(teacher_logps), student_logps.exp()
    log_mixture = _log_mixture_ratio(teacher_logps - student_logps, 1 - alpha)
    return _kl(probs, log_mixture, alpha * probs + (1 - alpha) * teacher_logps.exp())


def jsd(student_logps: Tensor, teacher_logps: Tensor, *, beta: float = 0.5) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1).

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, the student in m live. It is computed as
    the mixture of two skew divergences that it is. It vanishes like beta (1 - beta) at both ends; as in TRL, `beta`
    exactly 0 stands for forward KL and exactly 1 for reverse KL, so the loss jumps there by the factor taken out.
    """
    if beta == 0:
        return forward_kl(student_logps, teacher_logps)
    if beta == 1:
        return reverse_kl(student_logps, teacher_logps)
    teacher_to_mixture = skew_forward_kl(student_logps, teacher_logps, alpha=beta)
    student_to_mixture = skew_reverse_kl(student_logps, teacher_logps, alpha=1 - beta)
    return beta * teacher_to_mixture + (1 - beta) * student_to_mixture


@torch.no_grad()
def adaptive_kl_head_weight(student_logps: Tensor, teacher_logps: Tensor, *, mu: float = 0.5) -> Tensor:
    """Return the share `[...]` of |p - q| in the teacher's head: the fewest ids with mass `mu`. 1/2 if p = q."""
    teacher_probs = teacher_logps.exp()
    gaps = (teacher_probs - student_logps.exp()).abs()
    descending, ids = teacher_probs.sort(dim=-1, descending=True)
    mass_before = descending.cumsum(-1) - descending
    head_gap = gaps.gather(-1, ids).masked_fill(mass_before >= mu, 0.0).sum(-1)
    total_gap = gaps.sum(-1)
    return torch.where(total_gap > 0, head_gap / total_gap, 0.5).clamp(max=1)


def adaptive_kl(student_logps: Tensor, teacher_logps: Tensor, *, mu: float = 0.5) -> Tensor:
    """Weight forward KL by the gap in the teacher's head, reverse KL by that in its tail (arXiv 2404.02657).

    The two weights are constants that sum to one; see `adaptive_kl_head_weight`.
    """
    head = adaptive_kl_head_weight(student_logps, teacher_logps, mu=mu)
    return head * forward_kl(student_logps, teacher_logps) + (1 - head) * reverse_kl(student_logps, teacher_logps)


def total_variation(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Compute half the sum of |p - q|, in [0, 1]: what speculative decoding rejects (arXiv 2310.08461)."""
    return 0.5 * (teacher_logps.detach().exp() - student_logps.exp()).abs().sum(-1)


def lk(student_logps: Tensor, teacher_logps: Tensor, *, kl_weight: float = 0.5) -> Tensor:
    """Compute kl_weight KL(p || q) + (1 - kl_weight) TV, the hybrid loss of drafts (LK losses, arXiv 2602.23881).

    TV is what speculative decoding rejects, but its gradient is small far from the teacher, where the KL leads. At its
    ends it is `total_variation` (0) and `forward_kl` (1). The weight is fixed; the paper's falls as acceptance rises.
    """
    if kl_weight == 1:
        return forward_kl(student_logps, teacher_logps)
    if kl_weight == 0:
        return total_variation(student_logps, teacher_logps)
    kl, distance = (f(student_logps, teacher_logps) for f in (forward_kl, total_variation))
    return kl_weight * kl + (1 - kl_weight) * distance


def taid(student_logps: Tensor, teacher_logps: Tensor, *, t: float = 0.4) -> Tensor:
    """Compute KL(p_t || q), p_t = softmax((1 - t) sg(log q) + t log p) constant (TAID, arXiv 2501.16937, eq. 3-4).

    `t` = 0 gives no gradient, `t` = 1 forward KL; `TaidSchedule` moves it from one towards the other.
    """
    student = _finite_constant(student_logps)
    mixed = torch.lerp(student, _finite_constant(teacher_logps).to(student.dtype), t)
    # Relative to the student's own normaliser, which is 0 but for rounding, equality stays exact.
    target = mixed - (mixed.logsumexp(-1, keepdim=True) - student.logsumexp(-1, keepdim=True))
    return forward_kl(student_logps, target)


def logit_mse(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Average over V the squared difference of logits, each centred over V (after Ba & Caruana, arXiv 1312.6184).

    Centring removes the constant in which log-probabilities and logits differ, so both give the same value; logits at
    temperature τ count as divided by τ. Ids that one of the two cannot say (-inf) have no distance: V is without them.
    """
    teacher_logps = teacher_logps.detach()
    masked = (student_logps == -math.inf) | (teacher_logps == -math.inf)
    count = (~masked).sum(-1, keepdim=True).clamp(min=1).to(student_logps.dtype)
    difference = student_logps.masked_fill(masked, 0.0) - teacher_logps.masked_fill(masked, 0.0)
    centred = (difference - difference.sum(-1, keepdim=True) / count).masked_fill(masked, 0.0)
    return (centred.square() / count).sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        jsd,
        skew_forward_kl,
        skew_reverse_kl,
        adaptive_kl,
        total_variation,
        lk,
        taid,
        logit_mse,
    )
}

_SMALLEST_SKEW = 1e-4

# Parameter name -> what is legal in words, and the same as a test. NaN fails every comparison.
_LEGAL: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": (
        f"0, 1, or from {_SMALLEST_SKEW} to {1 - _SMALLEST_SKEW}",
        lambda value: value in (0, 1) or _SMALLEST_SKEW <= value <= 1 - _SMALLEST_SKEW,
    ),
    "alpha": (f"0, or from {_SMALLEST_SKEW} to below 1", lambda value: value == 0 or _SMALLEST_SKEW <= value < 1),
    "kl_weight": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "mu": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "t": ("from 0 to 1", lambda value: 0 <= value <= 1),
}


def default_params(function: Callable[..., Tensor]) -> dict[str, float]:
    """Return the parameters of one of `DIVERGENCES` and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def resolve_divergence(name: str, **params: float) -> Divergence:
    """Return the divergence `name`, its parameters fixed: `f(student_logps, teacher_logps)` to per-token values.

    Raises:
        ConfigurationError: an unknown name, a parameter that this divergence does not have, or a value out of range.
    """
    if name not in DIVERGENCES:
        close = difflib.get_close_matches(str(name), DIVERGENCES, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ConfigurationError(f"Unknown divergence {shown(name)!r}. {hint}Choose one of {', '.join(DIVERGENCES)}.")
    function = DIVERGENCES[name]
    defaults = default_params(function)
    legal = ", ".join(f"{key}={value} ({_LEGAL[key][0]})" for key, value in defaults.items()) or "none"
    for key, value in params.items():
        if key not in defaults:
            raise ConfigurationError(
                f"Divergence {name!r} has no parameter {shown(key)!r}. Its parameters and their defaults: {legal}. "
                f"Remove {shown(key)!r}, or choose a divergence that has it."
            )
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not _LEGAL[key][1](value):
            raise ConfigurationError(
                f"Divergence {name!r} got {key}={value!r}, expected a number {_LEGAL[key][0]}. "
                f"Parameters and their defaults: {legal}."
            )
    return functools.partial(function, **params) if params else function


@dataclass(frozen=True)
class _TaidState:
    t: float
    momentum: float = 0.0
    previous_loss: float | None = None


class TaidSchedule:
    """The interpolation weight t of `taid` (TAID, arXiv 2501.16937, algorithm 1). It never falls.

    t <- min(t_end, max(linear, t + alpha * sigmoid(m) * (1 - t))), where `linear` runs from `t_start` to `t_end` over
    training and m is a moving average of the loss's relative drop from one step to the next.

    Args:
        t_start: weight of the teacher at the first step.
        t_end: weight it ends at.
        alpha: largest adaptive move per step, as a share of the way left; 0 leaves the linear schedule.
        decay: of the moving average.
    """

    def __init__(self, t_start: float = 0.4, t_end: float = 1.0, alpha: float = 5e-4, decay: float = 0.99) -> None:
        if not 0 <= t_start <= t_end <= 1:
            raise ConfigurationError(
                f"TAID got t_start={t_start!r} and t_end={t_end!r}, expected 0 <= t_start <= t_end <= 1. "
                "The defaults are 0.4 and 1.0."
            )
        if not (0 <= alpha <= 1 and 0 <= decay < 1):
            raise ConfigurationError(
                f"TAID got alpha={alpha!r} and decay={decay!r}, expected 0 <= alpha <= 1 and 0 <= decay < 1. "
                "The defaults are 5e-4 and 0.99."
            )
        self.t_start, self.t_end, self.alpha, self.decay = t_start, t_end, alpha, decay
        self._state = _TaidState(t=t_start)

    @property
    def t(self) -> float:
        """The weight of the teacher now."""
        return self._state.t

    def step(self, loss: float, progress: float) -> float:
        """Move t once per optimiser step and return it.

        Args:
            loss: of the step just made, the same number on every rank.
            progress: share of training done, from 0 to 1.
        """
        old = self._state
        linear = (1 - progress) * self.t_start + progress * self.t_end
        momentum, adaptive = old.momentum, old.t
        # A first loss has no drop; from a loss of 0, and to or from NaN and infinity, the relative drop means nothing.
        if old.previous_loss is not None and old.previous_loss > 0 and math.isfinite(loss):
            drop = (old.previous_loss - loss) / old.previous_loss
            momentum = self.decay * momentum + (1 - self.decay) * drop
            sigmoid = 0.5 * (1 + math.tanh(momentum / 2))
            adaptive = old.t + self.alpha * sigmoid * (1 - old.t)
        self._state = _TaidState(
            t=min(self.t_end, max(linear, adaptive)),
            momentum=momentum,
            previous_loss=loss if math.isfinite(loss) else old.previous_loss,
        )
        return self.t

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, for a checkpoint."""
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._state = _TaidState(**state)
