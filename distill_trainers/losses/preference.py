"""Losses on pairs of responses, of which one is preferred: pure functions of log-probabilities of whole responses.

Shapes: B pairs. For a prompt x, w is the chosen and l the rejected response, q the student, r the reference (in DPKD
the teacher itself). The implicit reward of a response is β·log[q(y|x)/r(y|x)], its length normalised form
(β/|y|)·log[q(y|x)/r(y|x)], and the margin is the chosen reward minus the rejected one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..signals import TokenLogits, TokenSignal
from .divergences import skew_forward_kl, skew_reverse_kl
from .per_token import token_divergence

PreferenceLoss = Callable[[Tensor], Tensor]

ALPHA_MIN = 0.01  # DistiLLM-2 keeps its α at or above this


def implicit_rewards(
    logps: Tensor, reference_logps: Tensor | None, lengths: Tensor, *, beta: float, length_normalized: bool = True
) -> Tensor:
    """Compute β·log(q/r) of responses, per token if `length_normalized` (DPKD, arXiv 2406.19774).

    Args:
        logps, reference_logps: `[B]` sums over the tokens of each response; without a reference β·log q.
        lengths: `[B]` numbers of those tokens.

    Returns:
        `[B]`, in nats times β; 0 where student and reference agree.
    """
    ratios = logps if reference_logps is None else logps - reference_logps.to(logps.dtype)
    return beta * (ratios / lengths.clamp(min=1) if length_normalized else ratios)


def sigmoid_preference(margin: Tensor) -> Tensor:
    """Compute −log σ(margin), ln 2 at margin 0: Bradley–Terry (DPO, arXiv 2305.18290, eq. 7; DPKD, 2406.19774).

    Its gradient is −β·σ(r̂_l − r̂_w)·[∇log q(y_w)/|y_w| − ∇log q(y_l)/|y_l|].
    """
    return -F.logsigmoid(margin)


def hinge_preference(margin: Tensor) -> Tensor:
    """Compute max(0, 1 − margin) (SLiC, arXiv 2305.10425); 1 at margin 0."""
    return torch.relu(1 - margin)


def ipo_preference(margin: Tensor, *, beta: float) -> Tensor:
    """Compute (margin/β − 1/(2β))²: the margin has a target and does not grow (IPO, arXiv 2310.12036, eq. 17)."""
    return (margin / beta - 1 / (2 * beta)) ** 2


def simpo_preference(margin: Tensor, *, target_margin: float) -> Tensor:
    """Compute −log σ(margin − γ), rewards without reference, β·log q(y)/|y| (SimPO, arXiv 2405.14734, eq. 6)."""
    return -F.logsigmoid(margin - target_margin)


# Name to a function of β and γ that gives the loss as a function of the margin alone.
PREFERENCE_LOSSES: dict[str, Callable[[float, float], PreferenceLoss]] = {
    "sigmoid": lambda beta, target_margin: sigmoid_preference,
    "ipo": lambda beta, target_margin: partial(ipo_preference, beta=beta),
    "hinge": lambda beta, target_margin: hinge_preference,
    "simpo": lambda beta, target_margin: partial(simpo_preference, target_margin=target_margin),
}


def logprob_mse(logps: Tensor, teacher_logps: Tensor, lengths: Tensor) -> Tensor:
    """Square the difference `[B]` of the two models' mean log-probabilities per token, in nats²."""
    return ((logps - teacher_logps.to(logps.dtype)) / lengths.clamp(min=1)) ** 2


def contrastive_skew(
    student: TokenLogits, teacher: TokenSignal, chosen: Tensor, alpha: float | Tensor, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Compute DistiLLM-2's divergences (arXiv 2503.07067): SKL on chosen tokens, SRKL on rejected ones.

    Args:
        student, teacher: logits of n tokens, those of chosen responses first.
        chosen: `[n]`, 1 for tokens of chosen responses and 0 for those of rejected ones.
        alpha: skew of all tokens, or of each `[n]`.

    Returns:
        `skew_chosen` and `skew_rejected` `[n]`, each 0 on the tokens of the other kind, in nats.
    """
    assert isinstance(teacher, TokenLogits)
    cut = int(chosen.sum())

    def side(divergence: Callable[..., Tensor], rows: slice) -> Tensor:
        student_logits, target = student.logits[rows], TokenLogits(teacher.logits[rows])
        if isinstance(alpha, Tensor):  # closed forms know one α for all tokens
            skew = alpha[rows, None].to(student_logits.dtype)
            return divergence(TokenLogits(student_logits).logps(temperature), target.logps(temperature), alpha=skew)
        return token_divergence(partial(divergence, alpha=alpha), TokenLogits(student_logits), target, temperature)

    # Whole blocks, since slices cost nothing: a chunk holds one kind of tokens but for the one that holds the border.
    first, second = side(skew_forward_kl, slice(0, cut)), side(skew_reverse_kl, slice(cut, None))
    nothing = first.new_zeros(())
    return {
        "skew_chosen": torch.cat([first, nothing.expand(len(second))]),
        "skew_rejected": torch.cat([nothing.expand(len(first)), second]),
    }


def adaptive_skew(gaps: Tensor, mean_gap: Tensor | float, alpha: float) -> Tensor:
    """Compute DistiLLM-2's α by response: 1 − (1 − α₀)·m/gap, within 0.01 and α₀ (arXiv 2503.07067, section 3.2).

    Easy responses, whose gap is below the mean, get the smaller α, so that their divergence weighs about as much.

    Args:
        gaps: `[B]` difference of the two models' mean token probabilities, signed so that it is usually positive:
            teacher − student on chosen, student − teacher on rejected responses.
        mean_gap: m, their mean over many responses; at or below 0 it is not known yet, and all get α₀.
        alpha: α₀.
    """
    mean = torch.as_tensor(mean_gap, dtype=gaps.dtype, device=gaps.device)
    skew = (1 - (1 - alpha) * mean / gaps.clamp(min=1e-5)).clamp(ALPHA_MIN, alpha)
    return torch.where(mean > 0, skew, alpha)


def contrastive_weight(progress: float) -> float:
    """Compute DistiLLM-2's rejected share: from 1/2 to 3/4 over the first half of training, then constant.

    The authors' code has twice this, 1 + min(1/2, step/steps).
    """
    return 0.5 + 0.25 * min(1.0, 2 * progress)
