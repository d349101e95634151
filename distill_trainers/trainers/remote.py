"""When a trainer's teacher is behind HTTP: what is refused, and how it is connected."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigurationError
from ..teachers import RemoteTeacher
from ..teachers.endpoints import is_remote, parse_servers
from ..teachers.remote import RemoteSettings, token_from_environment
from . import caching
from .config import DistillConfig

if TYPE_CHECKING:
    from .base import DistillTrainer

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
