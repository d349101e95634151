"""Warnings about runs that go through without an error, and train nothing."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ...losses.reduction import count_trained_tokens
from ..protocol import Run

logger = logging.getLogger(__name__)

CONSTANT_LOGS = 10  # logs of the very same loss before it is called constant

NO_GRADIENT = (
    "The gradient of the first optimiser step is exactly 0, so nothing is trained. Look whether the weights that "
    "should train have `requires_grad` (adapters: do their `target_modules` match?), whether the student is its own "
    "teacher, and whether its layers pass gradients on (some kernels are for inference alone)."
)
NO_LABELS = (
    "A batch of optimiser step %d has no trained token: all of its labels are -100. Look at the masks of its rows "
    "(`distill-trainers doctor` shows the first ones), at `max_length`, which may cut the completions off, and at the "
    "data collator."
)
NOT_MOVED = (
    "After %d optimiser steps each of the student's %d trained weights is exactly what it was at the start. Look at "
    "`learning_rate` (in bfloat16 a small step is rounded away: train float32 weights with `bf16: true`), at the "
    "gradient norm in the log, and whether the optimizer has the student's weights."
)
CONSTANT_LOSS = (
    "The loss has been exactly %s in the last %d logs. Look at `learning_rate` and the gradient norm in the log, and "
    "whether the rows have trained tokens."
)


class Sentinel(TrainerCallback):
    """Warns, once of each, of a first gradient of 0, batches without labels, a student that stands still, a fixed loss.

    Each process looks at what it holds: its batches, and its share of sharded weights.
    """

    def __init__(self, run: Run):
        self.run = run
        self.gradient_norm: Any = None  # of the coming optimiser step
        self._restart()

    def _restart(self) -> None:
        self._empty = torch.zeros((), dtype=torch.bool)
        self._told: set[str] = set()
        self._before: Tensor | None = None
        self._steps = 0  # that may have moved a weight: those with a learning rate
        self._logged: list[float] = []

    def look(self, batch: dict[str, Any]) -> None:
        """Take note of a micro-batch without labels; nothing waits for the device."""
        empty = count_trained_tokens([batch]) == 0
        self._empty = self._empty.to(empty.device) | empty

    def _warn(self, message: str, *values: Any) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning(message, *values)

    # ---- What the trainer tells -------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restart()
        self._first = state.global_step
        self._before = self._checksums()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if NO_LABELS not in self._told and bool(self._empty):
            self._warn(NO_LABELS, state.global_step + 1)
        if state.global_step == self._first and self.gradient_norm is not None and float(self.gradient_norm) == 0:
            self._warn(NO_GRADIENT)
        groups = getattr(optimizer, "param_groups", None) or [{"lr": 1.0}]
        self._steps += any(float(group["lr"]) != 0 for group in groups)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not when training has ended: by then the best checkpoint may have been loaded, of a run before this one.
        if (control.should_training_stop or state.global_step >= state.max_steps) and self._before is not None:
            before, self._before = self._before, None
            moved = (self._checksums() != before).any().float()
            moved = self.run.accelerator.reduce(moved.to(args.device), reduction="sum")
            if self._steps and not moved:
                self._warn(NOT_MOVED, self._steps, sum(p.numel() for p in self._trained()))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._logged = [*self._logged[1 - CONSTANT_LOGS :], float(logs["loss"])]
            if len(self._logged) == CONSTANT_LOGS and len(set(self._logged)) == 1:
                self._warn(CONSTANT_LOSS, self._logged[0], CONSTANT_LOGS)

    # ---- The student's weights --------------------------------------------------------------------------------------

    def _trained(self) -> list[Tensor]:
        """What this process holds of the weights that train: its shards, under FSDP2 and ZeRO-3."""
        parameters = [p for p in self.run.model.parameters() if p.requires_grad]
        shards = (getattr(p, "ds_tensor", p) for p in parameters)
        return [shard.to_local() if hasattr(shard, "to_local") else shard for shard in shards]

    @torch.no_grad()
    def _checksums(self) -> Tensor:
        """A number for each weight tensor, which any single change of a weight changes: `[tensors]`.

        Sums of the numbers' bits, as integers: a floating sum could lose a small change.
        """
        sums = [_bits(p).sum(dtype=torch.int64) for p in self._trained() if p.numel()]
        return torch.stack([value.cpu() for value in sums]) if sums else torch.zeros(0, dtype=torch.int64)


def _bits(values: Tensor) -> Tensor:
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.detach().contiguous().view(sizes[values.element_size()])
