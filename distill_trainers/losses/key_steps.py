"""Likelihood of the key steps of right chains, and against those of wrong ones (EDIT, arXiv 2405.19737, Eq. 6-7).

The paper minimises −Σ ω⁺ log q(y⁺) + Σ ω⁻ log q(y⁻) over the tokens in which a right and a wrong chain differ (as
printed, the sign of its Eq. 7 is turned round). The second sum has no lower bound: it falls for ever while a token that
is long gone becomes ever less likely. Both forms here are bounded below.
"""

from __future__ import annotations

from torch import Tensor

from ..signals import TokenLogits
from .sparse import other_logps

WRONG_TERMS = ("likelihood", "unlikelihood")


def wrong_step_loss(
    student: TokenLogits, labels: Tensor, label_logps: Tensor, kind: str = "likelihood", floor: float = -10.0
) -> Tensor:
    """Compute a loss that falls as the given tokens become less likely.

    Args:
        student: logits `[n, V]`.
        labels: the tokens `[n]`.
        label_logps: their log-probabilities `[n]` at temperature 1.
        kind: `likelihood`: max(log q, floor), the paper's term, which stops at the floor and so does its gradient;
            `unlikelihood`: −log(1 − q) ≥ 0 (Welleck et al., arXiv 1908.04319), whose gradient fades by itself.
        floor: in nats, below 0; for `likelihood`.

    Returns:
        values `[n]`.
    """
    if kind == "unlikelihood":
        return -other_logps(student, labels)
    return label_logps.clamp(min=floor)
