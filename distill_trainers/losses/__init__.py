"""Losses: pure functions of tensors, per-token values out, the teacher always a constant."""

from .divergences import (
    DIVERGENCES,
    TaidSchedule,
    adaptive_kl,
    forward_kl,
    jsd,
    lk,
    logit_mse,
    resolve_divergence,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    taid,
    total_variation,
)
from .fused_linear import fused_linear_divergence, fused_linear_terms
from .fused_logps import fused_token_logps, signal_token_logps
from .key_steps import wrong_step_loss
from .per_token import check_sparse, token_divergence
from .sparse import token_entropy, token_logps

__all__ = [
    "DIVERGENCES",
    "TaidSchedule",
    "adaptive_kl",
    "check_sparse",
    "forward_kl",
    "fused_linear_divergence",
    "fused_linear_terms",
    "fused_token_logps",
    "jsd",
    "lk",
    "logit_mse",
    "resolve_divergence",
    "reverse_kl",
    "signal_token_logps",
    "skew_forward_kl",
    "skew_reverse_kl",
    "taid",
    "token_divergence",
    "token_entropy",
    "token_logps",
    "total_variation",
    "wrong_step_loss",
]
