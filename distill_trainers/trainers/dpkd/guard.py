"""A watch over preference training: says when the student runs away from both responses, and what to change."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

MODES = ("warn", "stop", "off")
_SMOOTHING = 0.5  # share of the newest log in the running means
_FIRST_LOGS = 3  # whose mean is the start


class CollapseGuard(TrainerCallback):
    """Warns or stops when the rejected NLL has risen by `limit` nats per token while the chosen NLL has not fallen.

    The loss looks fine then: pushing the rejected responses away raises every margin, though nothing is learnt from the
    chosen ones. Both NLLs are compared, smoothed, with the first logs of the run.

    Args:
        mode: "warn" (once), "stop" or "off".
        limit: rise of the rejected NLL, in nats per token.
    """

    def __init__(self, mode: str, limit: float):
        self.mode = mode
        self.limit = limit
        self.start: dict[str, float] = {}
        self.now: dict[str, float] = {}
        self.logs = 0
        self.tripped = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        names = ("nll_chosen", "nll_rejected")
        if self.mode == "off" or self.tripped or logs is None or not all(name in logs for name in names):
            return
        self.logs += 1
        for name in names:
            value = logs[name]
            if self.logs <= _FIRST_LOGS:
                self.start[name] = self.start.get(name, 0.0) + (value - self.start.get(name, 0.0)) / self.logs
                self.now[name] = self.start[name]
            else:
                self.now[name] += _SMOOTHING * (value - self.now[name])
        rise = self.now["nll_rejected"] - self.start["nll_rejected"]
        if rise < self.limit or self.now["nll_chosen"] < self.start["nll_chosen"]:
            return
        self.tripped = True
        if state.is_world_process_zero:
            logger.warning(self.message(state.global_step))
        if self.mode == "stop":
            control.should_save = control.should_training_stop = True

    def message(self, step: int) -> str:
        """Say what was seen, and what to change."""
        changes = ", ".join(
            f"{side} {self.start[f'nll_{side}']:.2f} → {self.now[f'nll_{side}']:.2f}" for side in ("chosen", "rejected")
        )
        done = "Training stops here, with a checkpoint. " if self.mode == "stop" else ""
        return (
            f"Preference training is collapsing at step {step}: the student leaves the rejected responses without "
            f"coming nearer to the chosen ones (NLL in nats per token: {changes}). {done}Sample rejected responses "
            "anew (prompts in place of fixed pairs, `refresh_steps: 1`), raise `lm_loss_weight` (1) or `beta` (1), or "
            "lower `learning_rate`. `guard: off` ends this watch."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "now": self.now, "logs": self.logs, "tripped": self.tripped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.now = dict(state["start"]), dict(state["now"])
        self.logs, self.tripped = state["logs"], state["tripped"]
