"""Whether an engine that is sent weights serves those of the student as it is now."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..exceptions import UnlikeModelError

_LEAST_MOVE = 1e-5  # nats that count as more than the rounding of float32


@dataclass(frozen=True)
class Read:
    """What vLLM and the student think of the text that vLLM wrote for a probe.

    Args:
        texts: its tokens.
        served, own: log-probabilities of these, `[rows, tokens]`, by vLLM and by the student.
    """

    texts: list[list[int]]
    served: Tensor
    own: Tensor

    @property
    def off(self) -> float:
        """How far they differ in the mean, in nats."""
        return float((self.served - self.own).abs().mean())


def refuse_stale(now: Read, before: Read | None = None, tolerance: float = 0.1, hint: str = "") -> Read:
    """Refuse what is far off the student, or has stayed where it was while the student moved.

    The latter is a matter of rounding, not of a tolerance, so it finds weights that are one step old however small that
    step was, as soon as the steps together are more than rounding.

    Returns:
        what to compare with the next time.

    Raises:
        UnlikeModelError: vLLM does not serve what is trained.
    """
    to_compare = now
    if before is not None and now.texts == before.texts:
        moved = float((now.own - before.own).abs().mean())
        if moved <= max(3 * before.off, _LEAST_MOVE):
            to_compare = before  # not yet more than rounding
        elif 3 * float((now.served - before.served).abs().mean()) < moved:
            raise UnlikeModelError(
                f"vLLM serves weights of an earlier step: the student's log-probabilities of a probe moved by "
                f"{moved:.2g} nats, those of vLLM did not. Its rollouts would not be the student's. {hint}"
            )
    if not now.off <= tolerance:  # NaN is not
        raise UnlikeModelError(
            f"vLLM does not serve the student: its log-probabilities of a probe are {now.off:.2g} nats off the "
            f"student's, where {tolerance} are let pass (`tolerance` in `vllm_kwargs`). Serve the student's own model, "
            f"in a dtype near to the one it is trained in. {hint}"
        )
    return to_compare
