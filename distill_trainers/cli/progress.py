"""Progress: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback

from ..escaping import terminal, visible

# Behind the loss and its terms: what the methods' pages say to watch, then what all runs have.
_WATCHED: tuple[str, ...] = ("nll_chosen", "nll_rejected", "reward_margin", "reward", "sequence_kl", "wrong_logp")
_WATCHED += ("innovations", "reward_mean", "reward_flat_groups", "entropy")
_SHOWN = (*_WATCHED, "grad_norm", "learning_rate", "rollouts", "completion_length")
_MEASURED = ("rouge_l", "accuracy", "student_text_kl", "exposure_error", "distinct_4", "consistency", "ece")


class ProgressReport(TrainerCallback):
    """Shows steps, loss terms and evaluation scores on the main process only.

    Attributes:
        terms: names the terms of the loss as it is now; they may change from step to step.
    """

    def __init__(self) -> None:
        self.terms: Callable[[], Iterable[str]] = lambda: ()
        self.trained: dict[str, None] = {}
        self.bar: Any = None
        self.task: Any = None
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Remaining(),
        )
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.bar.start()
        self.task = self.bar.add_task("Training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        evaluated = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
        self.trained |= dict.fromkeys(self.terms())
        passed = (name for name in evaluated if name.startswith("pass@"))
        names: tuple[str, ...] = ("loss", *self.trained, *(name for name in _SHOWN if name not in self.trained))
        if evaluated:
            names = ("loss", "perplexity", "kl", "top1_agreement", *passed, "acceptance", *_MEASURED)
        values = evaluated or logs
        shown = [f"{name} {_short(values[name])}" for name in names if name in values]
        if not shown:
            return
        kind = "eval " if evaluated else "train"
        step = f" step {state.global_step}/{state.max_steps}" if state.max_steps else ""
        line = f"{kind}{step}  {'  '.join(shown)}"
        if self.bar is not None:
            self.bar.console.print(terminal(line))
        else:
            since = f"  ({time.monotonic() - self.started:.0f} s)" if self.started else ""
            print(visible(line) + since, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back, cursor and all."""
        self.started = 0.0
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def stop_progress(trainer: Any) -> None:
    """Stop the bars of a trainer that may have ended in an error."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressReport):
            callback.stop()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
