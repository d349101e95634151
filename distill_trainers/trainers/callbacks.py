"""Callbacks that every distillation run needs."""

from __future__ import annotations

import math
import signal
import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ..exceptions import TrainingDivergedError
from .checkpoints import find_last_complete_checkpoint

if TYPE_CHECKING:
    from .base import DistillTrainer


class StepLoss(TrainerCallback):
    """Gives the method each step's loss; stops before a step whose loss or gradient is NaN or infinite.

    One synchronisation per optimiser step, none per micro-step.
    """

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer
        self.loss = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step(self.loss)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        window, trainer.window_loss = trainer.window_loss, torch.zeros_like(trainer.window_loss)
        self.loss = trainer.accelerator.reduce(window, reduction="mean").item()
        if math.isfinite(self.loss):
            return
        checkpoint = find_last_complete_checkpoint(args.output_dir)
        step = state.global_step
        if self._weights_are_good() and (checkpoint is None or not checkpoint.endswith(f"-{step}")) and step > 0:
            trainer._save_checkpoint(trainer.model, trial=None)
            checkpoint = find_last_complete_checkpoint(args.output_dir)
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been written yet."
        raise TrainingDivergedError(
            f"The loss or gradient of optimiser step {step + 1} is NaN or infinite; training stopped before that step "
            f"changed a weight. {kept} Go on from there with a lower learning_rate or max_grad_norm, or in bf16 rather "
            "than fp16."
        )

    def _weights_are_good(self) -> bool:
        """Only single copies are looked at: DeepSpeed has already stepped, and shards would need everyone."""
        if self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled:
            return False
        return all(bool(torch.isfinite(p).all()) for p in self.trainer.model.parameters() if p.requires_grad)


class InterruptCallback(TrainerCallback):
    """Ctrl-C ends the running step, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self, trainer: DistillTrainer | None = None):
        self.trainer = trainer
        self.asked = False
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nInterrupted: finishing this step and saving a checkpoint (Ctrl-C again stops at once).", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        asked = self.asked
        if self.trainer is not None and self.trainer.accelerator.num_processes > 1:
            # Signals reach the processes at different steps; all must stop at the same one.
            votes = torch.tensor(float(asked), device=args.device)
            asked = bool(self.trainer.accelerator.reduce(votes, reduction="sum").item())
        if asked:
            self.asked = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
