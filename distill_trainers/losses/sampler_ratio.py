"""Weights for text that another sampler mu than the student q has drawn: one that rounds otherwise, or older weights.

With r_i = q(y_i) / mu(y_i), both after temperature and filters, and D_t that depends on the tokens before t alone (a
divergence over the vocabulary),

    E_q sum_t D_t = E_mu sum_t (prod_{i<t} r_i) D_t,

and what depends on y_t too takes the product through t. The products are exact, and their variance grows with length.
Bounded ratios of single tokens are biased instead: truncated as in TIS (Yao et al., 2025, "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training") or masked as in IcePop (Ring-1T, arXiv 2510.18855). D_t then takes that of
the token before t, the last factor of its product. The ratio of token t would correct nothing of it: its mean under mu
is 1 whatever stands before.

All weights are constants, 1 at mu = q. Shapes: B rows, T positions, N trained tokens, n of a chunk, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..signals import TokenLogits, TokenSignal
from .reduction import masked_sum
from .sparse import token_logps

CORRECTIONS = ("none", "truncate", "mask", "prefix")
# Batch entries [B, T]: log mu of each sampled token, and 1 on those of which it is known; both are 0 elsewhere.
SAMPLER_LOGPS, SAMPLED = "token_sampler_logps", "token_sampled"
# What `SamplerRatio.weights` adds to the tokens.
WEIGHT, LOG_RATIO, ROW_WEIGHT = "token_sampler_weight", "token_sampler_log_ratio", "token_sampler_row_weight"
# The metrics of `SamplerRatio.metrics`.
RATIO, OUTSIDE = "sampler_ratio", "sampler_outside"
_LOG_BOUND = 60.0  # e^60 is far from anything of use, and products with it are still finite in float32


def bounded_ratio(ratios: Tensor, kind: str, least: float | None = None, most: float | None = None) -> Tensor:
    """Bound ratios: "truncate" clamps them to [least, most], "mask" makes 0 of those outside, others are left."""
    if kind == "truncate" and (least, most) != (None, None):
        return ratios.clamp(least, most)
    return torch.where(is_outside(ratios, least, most), 0, ratios) if kind == "mask" else ratios


def is_outside(ratios: Tensor, least: float | None, most: float | None) -> Tensor:
    """Tell which ratios lie outside [least, most]; None is no bound."""
    outside = torch.zeros_like(ratios, dtype=torch.bool)
    if least is not None:
        outside |= ratios < least
    return outside if most is None else outside | (ratios > most)


def sampler_weights(
    log_ratios: Tensor, mask: Tensor, kind: str, least: float | None = None, most: float | None = None
) -> tuple[Tensor, Tensor]:
    """Weight what depends on the tokens before each sampled token, and what depends on that token too.

    Args:
        log_ratios: `[B, T]`, log q - log mu; anything outside the mask.
        mask: bool, the sampled tokens.
        kind: one of `CORRECTIONS`; "prefix" takes products along the row and no bounds.

    Returns:
        two `[B, T]`, at least float32, 0 outside the mask.
    """
    log_ratios = log_ratios.detach()
    logs = torch.where(mask, log_ratios.to(torch.promote_types(log_ratios.dtype, torch.float32)), 0)
    if kind == "none":
        logs = torch.zeros_like(logs)
    through = logs.cumsum(1) if kind == "prefix" else logs
    weights = bounded_ratio(through.clamp(max=_LOG_BOUND).exp(), kind, least, most)
    before = F.pad(weights[:, :-1], (1, 0), value=1.0)  # nothing sampled before it: the empty product
    return torch.where(mask, before, 0), torch.where(mask, weights, 0)


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Return weights times values, 0 at weight 0 even where a value is infinite."""
    return torch.where(weights != 0, weights * values, 0)


@dataclass(frozen=True)
class SamplerRatio:
    """What the student makes of tokens that a sampler drew, and how a loss over them is weighted.

    Args:
        kind: one of `CORRECTIONS`.
        least, most: bounds of the ratio; with "none" and "prefix" they only say what counts as outside.
        processed: turns the student's logits `[n, V]` into those to sample from (temperature and filters), so that both
            sides of a ratio are of the same kind; None takes the logits as they are.
    """

    kind: str = "none"
    least: float | None = None
    most: float | None = None
    processed: Callable[[Tensor], Tensor] | None = None

    def weighs(self, tokens: Mapping[str, Tensor]) -> bool:
        """Tell whether these tokens, `[N]` by name, get weights."""
        return self.kind != "none" and SAMPLER_LOGPS in tokens

    @torch.no_grad()
    def log_ratio(self, student: TokenLogits, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return log q - log mu of the sampled tokens of a chunk, `[n]`, 0 of others; -inf if a filter drops it."""
        logits, labels = student.logits.detach(), tokens["labels"]
        if self.processed is None:
            logps = token_logps(TokenLogits(logits), labels)
        else:
            scores = self.processed(logits)
            logps = scores.gather(-1, labels[:, None]).squeeze(-1) - scores.logsumexp(-1)
        return torch.where(tokens[SAMPLED] > 0, logps - tokens[SAMPLER_LOGPS], 0)

    def terms(self, student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor]) -> dict:
        """Compute log-ratios as a term of `fused_linear_terms`."""
        return {LOG_RATIO: self.log_ratio(student, tokens)}

    def weights(self, terms: Mapping[str, Tensor], tokens: Mapping[str, Tensor], predicts: Tensor) -> dict[str, Tensor]:
        """Return the entries `WEIGHT`, `ROW_WEIGHT` and `LOG_RATIO` `[N]`; weights are 1 where no sampler is known.

        `WEIGHT` is of what depends on the tokens before, `ROW_WEIGHT` of what depends on the whole row, as a reward
        does: with "prefix" the product of all its ratios, else the bounded ratio of the token.

        Args:
            terms: of `terms`, for all N tokens.
            predicts: bool `[B, T-1]`, marks the N tokens.
        """
        logs = terms[LOG_RATIO]
        sampled = tokens[SAMPLED] > 0
        rows = logs.new_zeros(predicts.shape).masked_scatter(predicts, logs)
        mask = torch.zeros_like(predicts).masked_scatter(predicts, sampled)
        before, through = sampler_weights(rows, mask, self.kind, self.least, self.most)
        if self.kind == "prefix":
            through = torch.where(mask, masked_sum(rows, mask, 1).clamp(max=_LOG_BOUND).exp()[:, None], 0)
        weights = {WEIGHT: before, ROW_WEIGHT: through}
        return {name: torch.where(sampled, of[predicts], 1.0) for name, of in weights.items()} | {LOG_RATIO: logs}

    def metrics(self, student: TokenLogits, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a chunk's ratios and which lie outside the bounds, `[n]`, 0 where unknown; none without a sampler."""
        if SAMPLER_LOGPS not in tokens:
            return {}
        logs = tokens[LOG_RATIO] if LOG_RATIO in tokens else self.log_ratio(student, tokens)
        ratios, sampled = logs.clamp(max=_LOG_BOUND).exp(), tokens[SAMPLED] > 0
        outside = is_outside(ratios, self.least, self.most).to(ratios.dtype)
        return {RATIO: torch.where(sampled, ratios, 0), OUTSIDE: torch.where(sampled, outside, 0)}
