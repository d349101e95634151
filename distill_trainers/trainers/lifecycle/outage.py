"""How a run ends when its teacher stays away."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...exceptions import TeacherServerError

if TYPE_CHECKING:
    from ..base import DistillTrainer

#
# A process whose teacher does not answer cannot simply raise: the others may be anywhere in the step, and would wait
# for it in their next collective. So it goes through the step with signals that say nothing (`holding_failures`), and
# before the step's last backward, in which DeepSpeed steps, all processes learn of it and end at the same place.


@dataclasses.dataclass
class LastStep:
    """What a checkpoint of the last finished step needs, and the step after it changes.

    Attributes:
        method: the method's state.
        draws: the states of all random generators.
    """

    method: dict[str, Any]
    draws: dict[str, Any]


def last_step(trainer: DistillTrainer) -> LastStep | None:
    """To be remembered at the end of each step; None with a teacher that cannot be away."""
    if not trainer.teacher.may_be_away:
        return None
    device = trainer.args.device
    draws = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    draws |= {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return LastStep(copy.deepcopy(trainer.method_state()), draws)


def end_together(trainer: DistillTrainer) -> None:
    """If the teacher of any process has failed, save the last finished step and end; all processes must ask.

    Raises:
        TeacherServerError: on all of them, after the checkpoint.
    """
    teacher = trainer.teacher
    if not teacher.may_be_away:
        return
    failure, teacher.failure = teacher.failure, None
    failed = torch.tensor(float(failure is not None), device=trainer.args.device)
    if not trainer.accelerator.reduce(failed, reduction="sum").item():
        return
    reason = failure or "The teacher's server gave another process no answer."
    raise TeacherServerError(f"{reason} {_keep_last_step(trainer)}") from failure


def _keep_last_step(trainer: DistillTrainer) -> str:
    """Write the checkpoint of the last finished step unless it is there; what to tell of it."""
    step, last = trainer.state.global_step, trainer.last_step
    if last is None:
        return "This run had not finished a step."
    if not any(Path(path).name == f"checkpoint-{step}" for path in trainer.run_checkpoints):
        random.setstate(last.draws["python"])
        np.random.set_state(last.draws["numpy"])
        torch.set_rng_state(last.draws["torch"])
        if "cuda" in last.draws:
            torch.cuda.set_rng_state(last.draws["cuda"], trainer.args.device)
        trainer.save_aside(last.method)
    return f"Its last step is kept in {trainer.run_checkpoints[-1]}."
