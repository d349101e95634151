"""Losses: pure functions of tensors, per-token values out, the teacher always a constant."""

from .divergences import (
    DIVERGENCES,
    TaidSchedule,
    adaptive_kl,
    forward_kl,
    jsd,
    logit_mse,
    resolve_divergence,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    taid,
    total_variation,
)
from .fused_linear import fused_linear_divergence, fused_linear_terms

__all__ = [
    "DIVERGENCES",
    "TaidSchedule",
    "adaptive_kl",
    "forward_kl",
    "fused_linear_divergence",
    "fused_linear_terms",
    "jsd",
    "logit_mse",
    "resolve_divergence",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "taid",
    "total_variation",
]
