"""Rewards of whole completions beside a divergence: advantages, their policy gradient, and weights of tokens.

max E_q[R] - beta KL(q || p) has its optimum at q* proportional to p e^(R / beta), and the gradient

    E_q sum_t (A - beta sum_{i>t} r_i) grad log q(y_t)  -  beta grad KL_t(q || p),      r = log q - log p, a constant,

where KL_t is the sum over the vocabulary, and A is R less a baseline that does not depend on the sample. Without the
sum over later tokens it is GKD's gradient, which takes the text as given: what a token does to the divergence of the
tokens behind it is left out.

Shapes: R completions of a step, B rows, T positions, N trained tokens, n of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..exceptions import ConfigurationError
from .policy_gradient import is_clipped
from .reduction import masked_sum, mean_per_row, sum_per_row

ADVANTAGES = ("leave_one_out", "group", "none")
SCALES = ("none", "group", "batch")
WEIGHTINGS = ("none", "rlsd", "iw_opd")
_LEAST_DEVIATION = 1e-4  # TRL's: added to deviations before rewards are divided by them


def group_advantages(rewards: Tensor, groups: Tensor, kind: str, scale: str = "none") -> Tensor:
    """Compute the advantages `[R]` of completions.

    Args:
        rewards: `[R]`; NaN where none is known. Such a completion gets 0, and is in no mean.
        groups: int64 `[R]`, from 0 on: completions of one prompt have one number.
        kind: "leave_one_out", R less the mean of the others of its group: unbiased (RLOO, arXiv 2402.14740). "group",
            R less the mean of all, as in GRPO (arXiv 2402.03300): for G samples that is 1 - 1/G of the former, in
            expectation too. "none", R itself.
        scale: "group" divides by the group's deviation, as GRPO does, "batch" by that of all: both are biased, since
            the deviation depends on the sample (arXiv 2503.20783).

    Returns:
        float64; exactly 0 where all of a group have one reward, or where "leave_one_out" has no others.

    Raises:
        ConfigurationError: an unknown kind or scale.
    """
    if kind not in ADVANTAGES or scale not in SCALES:
        names = f"advantage: {kind}` and `scale_rewards: {scale}"
        raise ConfigurationError(f"Got `{names}`; expected one of {', '.join(ADVANTAGES)} and of {', '.join(SCALES)}.")
    known, values = ~rewards.isnan(), rewards.double()
    deviations, counts = _from_group_mean(values, groups, known)
    if kind == "none":
        advantages = torch.where(known, values, 0)
    elif kind == "group":
        advantages = deviations
    else:
        others = counts[groups] - 1
        advantages = torch.where(others > 0, deviations * counts[groups] / others.clamp(min=1), 0)
    if scale == "none":
        return advantages
    # The deviation of all is that of one group that holds them.
    members = groups if scale == "group" else torch.zeros_like(groups)
    return advantages / (spread_of_groups(rewards, members)[members] + _LEAST_DEVIATION)


def spread_of_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """Compute the standard deviation of each group's rewards, with n - 1: float64 `[groups]`, 0 for a single one."""
    known = ~rewards.isnan()
    deviations, counts = _from_group_mean(rewards.double(), groups, known)
    return mean_per_row(sum_per_row(deviations**2, groups, len(counts)), counts - 1).sqrt()


def _from_group_mean(values: Tensor, groups: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards less their group's mean `[R]`, 0 where not known, and how many of each group are known."""
    number = int(groups.max()) + 1 if len(groups) else 0
    # From the least of the group on, so that equal rewards are exactly 0 apart from their mean.
    start = values.new_full((number,), torch.inf)
    start = start.scatter_reduce(0, groups, torch.where(known, values, torch.inf), "amin")
    above = torch.where(known, values - start[groups], 0)
    counts = sum_per_row(known.double(), groups, number)
    means = mean_per_row(sum_per_row(above, groups, number), counts)
    return torch.where(known, above - means[groups], 0), counts


def policy_term(
    logps: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    ratio: Tensor | None = None,
    clip_range: float | None = None,
) -> Tensor:
    """Compute the term `[n]` whose gradient is -w A grad log q(y_t): the policy gradient, to minimise.

    Its value is -w A, and says how large advantages are, not how well the student does.

    Args:
        logps: log q(y_t) of the distribution that was sampled from, with gradient.
        advantages: A, constants.
        weights: w of text that another sampler has drawn, constants; None is 1.
        ratio: q / sampler of each token, a constant, by which `clip_range` clips; None clips nothing.
        clip_range: c of PPO (arXiv 1707.06347, eq. 7): where the ratio has left [1 - c, 1 + c] in the direction of A,
            the token has no gradient, and its value that of the bound.
    """
    own = (logps - logps.detach()).exp()
    weight = own if weights is None else weights * own
    if ratio is not None and clip_range is not None:
        bound = torch.where(ratio > 1, 1 + clip_range, 1 - clip_range).to(weight)
        weight = torch.where(is_clipped(ratio, advantages, clip_range) > 0, bound, weight)
    return -weight * advantages


def rlsd_advantages(advantages: Tensor, log_ratios: Tensor, share: float, clip: float) -> Tensor:
    """Weigh advantages `[n]` by tokens on which the teacher agrees with them (RLSD, arXiv 2604.03128).

    A' = A [(1 - share) + share * clip(e^(sign(A) delta), 1 - clip, 1 + clip)], delta = log p - log q of the token:
    where the teacher would have said more of it, what was right is pushed more, what was wrong less. The sign stays.

    Args:
        log_ratios: delta, constants.
        share: 0 leaves advantages as they are.
        clip: below 1.
    """
    # Without an advantage there is nothing to weigh, also where delta is -inf, as of a token that the teacher excludes.
    delta = torch.where(advantages == 0, 0, advantages.sign() * log_ratios)
    factor = delta.exp().clamp(1 - clip, 1 + clip)
    return advantages * ((1 - share) + share * factor)


def iw_opd_weights(log_ratios: Tensor, mask: Tensor, strength: float) -> Tensor:
    """Weigh the divergence of sampled tokens by how little has gone wrong before them (IW-OPD, arXiv 2606.22600).

    w_t = 1 + strength * (1 - sum_{i<t} |a_i| / sum_i |a_i|), a = log p - log q: from 1 + strength at the first token
    down to 1, the sooner the sooner both models part.

    Args:
        log_ratios: a `[B, T]`; anything outside the mask.
        mask: bool, the sampled tokens.

    Returns:
        `[B, T]`, 0 outside the mask.
    """
    sizes = torch.where(mask, log_ratios.detach().abs(), 0)
    # Tokens that the teacher excludes have gone infinitely wrong. In the limit they alone count, each as much: all
    # tokens up to the first of them weigh 1 + strength, those behind the last one 1.
    endless = sizes.isinf()
    sizes = torch.where(endless.any(1, keepdim=True), endless.to(sizes), sizes)
    before, whole = sizes.cumsum(1) - sizes, masked_sum(sizes, mask, 1)[:, None]
    share = torch.where(whole > 0, before / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0)
    return torch.where(mask, 1 + strength * (1 - share), 0)
