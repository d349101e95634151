"""Callbacks that every distillation run needs."""

from __future__ import annotations

import math
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from ... import models
from ...exceptions import TrainingDivergedError
from ...run_files import is_complete
from ...teachers import Teacher
from ...trl_names import with_trl_metrics
from ..protocol import Run

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrlNames(TrainerCallback):
    """Gives trackers TRL's names of metrics beside ours. It comes before them; the run's own log keeps ours alone."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None:
            logs.update(with_trl_metrics(logs))


class StepLoss(TrainerCallback):
    """Gives the method each step's loss; stops before a step whose loss or gradient is NaN or infinite.

    The teacher hears of the step first: whatever evaluates or saves after it finds both as of the same step. One
    synchronisation per optimiser step, none per micro-step.
    """

    def __init__(self, run: Run):
        self.run = run
        self.loss = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.teacher.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.teacher.after_step()
        self.run.after_step(self.loss)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.run
        window, run.window_loss = run.window_loss, torch.zeros_like(run.window_loss)
        self.loss = run.accelerator.reduce(window, reduction="mean").item()
        if math.isfinite(self.loss):
            return
        raise divergence_error(run, "The loss or gradient", save=True)


def divergence_error(run: Run, what: str, *, save: bool = False) -> TrainingDivergedError:
    """Make the error to raise when `what` of the coming optimiser step is not finite.

    Args:
        save: keep the state before that step as a checkpoint, if its weights are finite. All processes must ask.
    """
    step, finite = run.state.global_step, _weights_are_finite(run.model, run.accelerator)
    last = f"checkpoint-{step}"
    earlier = [path for path in run.run_checkpoints if is_complete(path)]
    if finite is False:
        earlier = [path for path in earlier if Path(path).name != last]
    where = f"The last good checkpoint is {earlier[-1]}." if earlier else "No checkpoint had been written by this run."
    if save and finite and step > 0 and not any(Path(path).name == last for path in earlier):
        run.save_aside()
        where += f" The state before the failing step is kept in {run.run_checkpoints[-1]}."
    changed = "training stopped before that step changed a weight"
    if models.zero_stage(run.accelerator) is not None:
        changed = "training stopped, but DeepSpeed has taken that step: do not save the weights that are in memory"
    return TrainingDivergedError(
        f"{what} of optimiser step {step + 1} is NaN or infinite; {changed}. "
        f"{where} Go on from a good one with a lower learning_rate or max_grad_norm, or in bf16 rather than fp16."
    )


def _weights_are_finite(model: nn.Module, accelerator: Accelerator) -> bool | None:
    """None where that is not known: DeepSpeed has already stepped, and shards would need everyone."""
    if models.zero_stage(accelerator) is not None or models.fsdp_version(accelerator) is not None:
        return None
    return all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad)


class InterruptCallback(TrainerCallback):
    """Ctrl-C and SIGTERM end the running step, save a checkpoint and stop; a second Ctrl-C stops at once.

    SIGTERM is what schedulers send before they take a machine away, and launchers when another process has died.

    Args:
        teacher: is not waited for any longer.
        accelerator: of all processes, which must stop at the same step.
    """

    def __init__(self, teacher: Teacher, accelerator: Accelerator):
        self.teacher = teacher
        self.accelerator = accelerator
        self.asked = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            print(
                "\nInterrupted: finishing this step and saving a checkpoint (Ctrl-C again stops at once).", flush=True
            )
        self.asked = True
        self.teacher.stop_waiting()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        ends = self.asked
        if self.accelerator.num_processes > 1:
            # Signals reach the processes at different steps; all must stop at the same one.
            votes = torch.tensor(float(ends), device=args.device)
            ends = bool(self.accelerator.reduce(votes, reduction="sum").item())
        if ends:
            self.asked = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def give_signals_back(self) -> None:
        """Let the process be ended as before the run; its handlers would keep the models in memory, too."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.give_signals_back()


class TeacherKeeper(TrainerCallback):
    """Writes out what a teacher recorded wherever a run may end or go on from."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def _flush(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.flush()

    on_epoch_end = on_save = on_evaluate = on_train_end = _flush
