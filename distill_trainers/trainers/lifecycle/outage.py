"""How a run ends when its teacher stays away.

A process whose teacher does not answer cannot simply raise: the others may be anywhere in the step, and would wait for
it in their next collective. So it goes through the step with signals that say nothing (`Teacher.holding_failures`), and
before the step's last backward, in which DeepSpeed steps, all processes learn of it and end at the same place.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...exceptions import TeacherServerError
from ..protocol import Run


@dataclasses.dataclass
class LastStep:
    """What a checkpoint of the last finished step needs, and the step after it changes."""

    method: dict[str, Any]
    draws: dict[str, Any]


def last_step(method_state: dict[str, Any], device: torch.device) -> LastStep:
    """Remember the step that is over."""
    draws = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    draws |= {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return LastStep(copy.deepcopy(method_state), draws)


def keep_finished_step(run: Run) -> str:
    """Write a checkpoint of the step that is over, unless it is there; what to tell of it. All processes must ask.

    For failures between steps, when nothing of the next one has changed anything yet.
    """
    step = run.state.global_step
    kept = [path for path in run.run_checkpoints if Path(path).name == f"checkpoint-{step}"]
    if step > 0 and not kept:
        run.save_aside()
        kept = run.run_checkpoints[-1:]
    return f"The last finished step is kept in {kept[-1]}." if kept else "This run had not finished a step."


def end_together(run: Run, last: LastStep | None) -> None:
    """Save the last finished step and end, if any process's teacher has failed; all processes must ask.

    Args:
        last: None before the run has finished a step.

    Raises:
        TeacherServerError: on all of them, after the checkpoint.
    """
    teacher = run.teacher
    if not teacher.may_be_away:
        return
    failure, teacher.failure = teacher.failure, None
    failed = torch.tensor(float(failure is not None), device=run.args.device)
    if not run.accelerator.reduce(failed, reduction="sum").item():
        return
    reason = failure or "The teacher's server gave another process no answer."
    raise TeacherServerError(f"{reason} {_keep_last_step(run, last)}") from failure


def _keep_last_step(run: Run, last: LastStep | None) -> str:
    """Write the checkpoint of the last finished step unless it is there; what to tell of it."""
    if last is None:
        return "This run had not finished a step."
    if not any(Path(path).name == f"checkpoint-{run.state.global_step}" for path in run.run_checkpoints):
        random.setstate(last.draws["python"])
        np.random.set_state(last.draws["numpy"])
        torch.set_rng_state(last.draws["torch"])
        if "cuda" in last.draws:
            torch.cuda.set_rng_state(last.draws["cuda"], run.args.device)
        run.save_aside(last.method)
    return f"Its last step is kept in {run.run_checkpoints[-1]}."
