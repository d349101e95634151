"""When a trainer's teacher is behind HTTP: what is refused, how it is connected, how a run ends without it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...exceptions import ConfigurationError, TeacherServerError
from ...teachers import RemoteTeacher
from ...teachers.base import is_remote
from ...teachers.remote.dialects import RemoteSettings, token_from_environment
from ...teachers.remote.endpoints import parse_servers
from ..config import DistillConfig
from . import cache_filling as caching

if TYPE_CHECKING:
    from ..base import DistillTrainer

_PREFIX = "teacher_server_"


def check(trainer: DistillTrainer, teacher: Any) -> None:
    """Refuse what a teacher behind HTTP cannot serve, before any server is asked.

    Raises:
        ConfigurationError: naming the settings that exclude each other.
    """
    args = trainer.args
    if not is_remote(teacher) and not isinstance(teacher, RemoteTeacher):
        _refuse_idle_settings(args)
        return
    if args.teacher_cache is not None:
        raise ConfigurationError(
            f"Got `teacher_cache: {args.teacher_cache}` with a teacher behind HTTP; expected one of them. Leave the "
            "cache out, or fill it where the teacher is and bring the folder here."
        )
    if getattr(args, "reference_logps_dir", None) is not None and getattr(args, "reference", None) == "teacher":
        raise ConfigurationError(
            "Got `reference_logps_dir` with a teacher behind HTTP as the reference; its log-probabilities are kept "
            "only of local models. Leave `reference_logps_dir` out."
        )
    if args.teacher_model_init_kwargs:
        raise ConfigurationError(
            "`teacher_model_init_kwargs` act while a teacher is loaded, but this one is behind HTTP. Give them to its "
            "server (`--dtype`, `--device-map`), and leave them out here."
        )
    if isinstance(teacher, str):
        parse_servers(teacher)
    kind = args.teacher_server_kind if isinstance(teacher, str) else teacher.settings.kind
    told = "token_logprobs" if kind == "token_logprobs" else "distribution"
    missing = trainer.needs - {told} - ({"token_logprobs"} if told == "distribution" else set())
    if trainer.replaces_completions:
        missing |= {"completions"}
    if missing:
        raise ConfigurationError(
            f"{type(trainer).__name__} needs {sorted(missing)} of its teacher under these settings, but a teacher "
            f"behind HTTP with `teacher_server_kind: {kind}` gives its {told} alone. Use a local teacher, or settings "
            "that need less (`teacher_mix_alpha: 0`, no `seq_kd`, another `teacher_server_kind`)."
        )
    caching.check_kind(trainer, kind, "teacher_server_kind")


def _refuse_idle_settings(args: DistillConfig) -> None:
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name.startswith(_PREFIX) and value != field.default:
            raise ConfigurationError(
                f"Got `{field.name}: {value}`; expected `teacher_model_name_or_path: http://…` beside it: the address "
                "of a teacher's server."
            )


def connected(teacher: Any, tokenizer: Any, args: DistillConfig) -> Any:
    """The teacher at an address, once its servers have told that they serve this student; any other as it was given.

    Raises:
        ConfigurationError: a server is not there, or does not fit the student's tokenizer or the settings.
    """
    if is_remote(teacher):
        names = (field.name for field in dataclasses.fields(RemoteSettings) if field.name != "seed")
        own: dict[str, Any] = {name: getattr(args, _PREFIX + name) for name in names}
        teacher = RemoteTeacher(teacher, RemoteSettings(**own, seed=args.seed), token_from_environment())
    if isinstance(teacher, RemoteTeacher):
        teacher.meet(tokenizer, args.max_length)
    return teacher


# ---- Ending without it ----------------------------------------------------------------------------------------------
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
    if not isinstance(trainer.teacher, RemoteTeacher):
        return None
    device = trainer.args.device
    draws = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    draws |= {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return LastStep(copy.deepcopy(trainer.method_state()), draws)


def holding_failures(trainer: DistillTrainer) -> contextlib.AbstractContextManager[None]:
    """Within it, a teacher that does not answer any more does not end this process alone."""
    teacher = trainer.teacher
    return teacher.holding_failures() if isinstance(teacher, RemoteTeacher) else contextlib.nullcontext()


def end_together(trainer: DistillTrainer) -> None:
    """If the teacher of any process has failed, save the last finished step and end; all processes must ask.

    Raises:
        TeacherServerError: on all of them, after the checkpoint.
    """
    teacher = trainer.teacher
    if not isinstance(teacher, RemoteTeacher):
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
