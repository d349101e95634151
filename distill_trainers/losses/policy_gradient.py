"""The reverse KL of whole sequences as a policy gradient: rewards, returns, importance weights, clipped surrogate.

MiniLLM (Gu et al., arXiv 2306.08543). With r_t = log p(y_t) - log q(y_t), R_t = the sum of r from t on,

    grad KL(q || p) = -E_q sum_t R_t grad log q(y_t)
                    = grad E_q sum_t KL_t(q || p)  [Single]  -  E_q sum_t R_{t+1} grad log q(y_t)  [Long].

Everything here is `[B, T]` with a bool mask of the tokens that were sampled. What lies outside the mask never enters a
result, so that padding may hold anything, and is 0 in what comes back. Values are at least float32. All of them are
constants: a gradient comes in by the ratio of `clipped_surrogate` alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..exceptions import ConfigurationError
from .reduction import masked_sum

IMPORTANCE = ("token", "prefix")
# Log-ratios are bounded by this before they are exponentiated: e^60 is far from anything of use, and its products with
# rewards are still finite in float32.
_LOG_BOUND = 60.0


def sequence_rewards(
    student_logps: Tensor, teacher_logps: Tensor, mask: Tensor, *, scale: float = 1.0, clip: float | None = None
) -> Tensor:
    """Compute r_t = log p(y_t) - log q(y_t) of the sampled tokens `[B, T]`, in nats.

    Args:
        scale: factor on every reward.
        clip: bound on the size of a scaled reward; None is off.
    """
    rewards = scale * (_masked(teacher_logps, mask) - _masked(student_logps, mask))
    return rewards if clip is None else rewards.clamp(-clip, clip)


def returns_after(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, normalise: bool = False) -> Tensor:
    """Compute R_{t+1} = sum over k >= 1 of gamma^(k-1) r_{t+k}: what follows each token, its own reward left out.

    The discount goes by the distance between tokens, not by their place in the row. `normalise` divides by the number
    of terms, T - t for the t-th of T tokens (the paper's eq. 7 has T - t - 1, which is 0 at the last but one); the
    last token has none, and a return of 0.
    """
    rewards = _masked(rewards, mask)
    if gamma == 1.0:
        returns = _sum_after(rewards)
    else:
        after, columns = torch.zeros_like(rewards[:, 0]), []
        for reward, sampled in zip(reversed(rewards.unbind(1)), reversed(mask.unbind(1)), strict=True):
            columns.append(after)
            after = torch.where(sampled, reward + gamma * after, after)
        returns = torch.stack(columns[::-1], dim=1)
    if normalise:
        returns = returns / _sum_after(mask.to(returns.dtype)).clamp(min=1)
    return torch.where(mask, returns, 0)


def importance_weights(
    student_logps: Tensor, sampler_logps: Tensor, mask: Tensor, kind: str = "token"
) -> tuple[Tensor, Tensor]:
    """Weight tokens drawn from a sampler other than the student (teacher-mixed, or at another temperature).

    Args:
        student_logps, sampler_logps: `[B, T]`, log q(y_t) and the log-probability with which y_t was drawn.
        kind: "prefix", the exact product of q / sampler along the row; or "token", the paper's approximation by the
            ratio of the token alone, which forgets that the prefix was drawn from the sampler too (biased).

    Returns:
        two `[B, T]`: the weight of what depends on the tokens before t (a vocabulary sum at t), and of what depends on
        t itself too (its reward). For "token" both are q / sampler of the token.

    Raises:
        ConfigurationError: an unknown kind.
    """
    if kind not in IMPORTANCE:
        raise ConfigurationError(f"Got `importance: {kind}`; expected one of {', '.join(IMPORTANCE)}.")
    ratios = _masked(student_logps, mask) - _masked(sampler_logps, mask)
    if kind == "token":
        weights = torch.where(mask, _exp(ratios), 0)
        return weights, weights
    through = ratios.cumsum(1)
    return torch.where(mask, _exp(through - ratios), 0), torch.where(mask, _exp(through), 0)


def row_weights(through: Tensor, mask: Tensor) -> Tensor:
    """Return the weight of what depends on a whole row, on all its tokens: the last of its products "prefix"."""
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(mask, masked_sum(through, last, 1)[:, None], 0)


def sequence_advantages(
    rewards: Tensor, weights: Tensor, mask: Tensor, kind: str = "token", *, gamma: float = 1.0, normalise: bool = False
) -> Tensor:
    """Compute weighted R_{t+1} `[B, T]`, the advantages of Long.

    Args:
        weights: the second of `importance_weights`.
        kind: with "prefix", the reward of each later token is weighted by the product through that token, without
            which the expectation is not exact; with "token", the return is weighted by the ratio of token t.
    """
    if kind == "prefix":
        return returns_after(weights * rewards, mask, gamma=gamma, normalise=normalise)
    return weights * returns_after(rewards, mask, gamma=gamma, normalise=normalise)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float | None) -> Tensor:
    """Compute min(ratio * A, clip(ratio, 1 - c, 1 + c) * A) per token, to maximise (PPO, arXiv 1707.06347, eq. 7).

    At ratio = 1 its gradient is A * grad log q.

    Args:
        ratio: q now / q when it sampled, with gradient.
        advantages: of the same shape, constants.
        clip_range: c; None does not clip.
    """
    return clipped_ratio(ratio, advantages, clip_range) * advantages


def clipped_ratio(ratio: Tensor, advantages: Tensor, clip_range: float | None) -> Tensor:
    """Return the ratio by which `clipped_surrogate` multiplies advantages: parts of them give parts of its value."""
    if clip_range is None:
        return ratio
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.where(is_clipped(ratio, advantages, clip_range) > 0, bounded, ratio)


def is_clipped(ratio: Tensor, advantages: Tensor, clip_range: float | None) -> Tensor:
    """Return 1 where `clipped_surrogate` no longer depends on the ratio, else 0, in the ratio's dtype."""
    if clip_range is None:
        return torch.zeros_like(ratio)
    above, below = ratio > 1 + clip_range, ratio < 1 - clip_range
    return ((above & (advantages > 0)) | (below & (advantages < 0))).to(ratio.dtype)


def probability_ratio(logps: Tensor, sampled_logps: Tensor) -> Tensor:
    """Compute q now / q when it sampled, from log-probabilities of the tokens; bounded to stay finite."""
    return _exp(logps - sampled_logps)


def mixture_share(teacher_logps: Tensor, sampler_logps: Tensor, alpha: float, mask: Tensor) -> Tensor:
    """Tell how likely each token `[B, T]` of a draw from alpha * p + (1 - alpha) * q came from the teacher."""
    return torch.where(mask, alpha * _exp(_masked(teacher_logps, mask) - _masked(sampler_logps, mask)), 0)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    values = values.detach()
    return torch.where(mask, values.to(torch.promote_types(values.dtype, torch.float32)), 0)


def _sum_after(values: Tensor) -> Tensor:
    """Sum of what stands behind each column, from the right, so that it does not depend on what stands before."""
    through = values.flip(1).cumsum(1).flip(1)
    return torch.cat([through[:, 1:], torch.zeros_like(through[:, :1])], dim=1)


def _exp(logs: Tensor) -> Tensor:
    return logs.clamp(max=_LOG_BOUND).exp()
