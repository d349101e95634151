"""Where a teacher's weights are, independent of the student's: names, what each of them needs, and what is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigurationError
from .base import Teacher, is_remote
from .cache.teacher import CachedTeacher

if TYPE_CHECKING:
    from ..trainers.config import DistillConfig


@dataclass(frozen=True)
class Placement:
    """One way to keep a teacher.

    Args:
        summary: where its weights are.
        shards: a process holds a share of them, and answers only when all processes ask.
        by_name: it acts while weights are loaded, so the teacher must be a folder or Hub id.
        has_body: weights of the teacher's own are loaded in the process that trains.
        package: what must be installed, and the extra that installs it.
    """

    summary: str
    shards: bool = False
    by_name: bool = False
    has_body: bool = True
    package: tuple[str, str] | None = None


_DEEPSPEED, _BITSANDBYTES = ("deepspeed", "deepspeed"), ("bitsandbytes", "quantization")
PLACEMENTS: dict[str, Placement] = {
    "auto": Placement("as the launch has the student: sharded under ZeRO-3 and FSDP2, else whole on each process"),
    "replicate": Placement("whole on each process"),
    "zero3": Placement("partitioned by ZeRO-3, gathered layer by layer", shards=True, package=_DEEPSPEED),
    "zero3_offload": Placement(
        "partitioned by ZeRO-3 in the CPU's memory, gathered layer by layer", shards=True, package=_DEEPSPEED
    ),
    "fsdp2": Placement("sharded by FSDP2, gathered layer by layer", shards=True),
    "device_map": Placement("spread over the devices of one process by accelerate", by_name=True),
    "quantized-8bit": Placement("whole on each process in 8 bits", by_name=True, package=_BITSANDBYTES),
    "quantized-4bit": Placement("whole on each process in 4 bits (NF4)", by_name=True, package=_BITSANDBYTES),
    "adapter_off": Placement(
        "the student's own base, or another adapter on it: nothing more in memory", has_body=False
    ),
    "cached": Placement("its answers on disk", has_body=False),
    "remote": Placement("behind a URL, in another process", has_body=False),
}


def is_collective(placement: str, zero_stage: int | None, fsdp_version: int | None) -> bool:
    """Whether a teacher so placed answers only when all processes ask, in a launch of several processes."""
    if placement == "auto":
        return zero_stage == 3 or fsdp_version == 2
    return PLACEMENTS[placement].shards


def check_settings(args: DistillConfig) -> None:
    """Refuse a placement that contradicts other settings.

    Raises:
        ConfigurationError: by name, and with what to do.
    """
    placement = args.teacher_placement
    if placement not in PLACEMENTS:
        raise ConfigurationError(f"Got `teacher_placement: {placement}`; expected one of {', '.join(PLACEMENTS)}.")
    if args.teacher_adapter is not None and placement != "adapter_off":
        raise ConfigurationError(
            f"Got `teacher_adapter: {args.teacher_adapter}` with `teacher_placement: {placement}`; expected "
            "`adapter_off`, where the teacher is an adapter on the student's base. Set it, or leave the adapter out."
        )
    if placement == "cached" and args.teacher_cache is None:
        raise ConfigurationError(
            "Got `teacher_placement: cached` without `teacher_cache`; expected the folder of a cache that "
            "`distill-trainers cache-teacher` has filled."
        )
    if placement in ("adapter_off", "remote") and args.teacher_cache is not None:
        raise ConfigurationError(
            f"Got `teacher_cache: {args.teacher_cache}` with `teacher_placement: {placement}`; expected one of them. "
            "Leave one out; to fill a cache and read it, name the teacher by folder or Hub id, and set `cached`."
        )
    package = PLACEMENTS[placement].package
    if package is not None and importlib.util.find_spec(package[0]) is None:
        raise ConfigurationError(
            f"Got `teacher_placement: {placement}`, but {package[0]} is not installed; "
            f"`pip install 'distill-trainers[{package[1]}]'`, or take another placement."
        )


def check_teacher(
    args: DistillConfig, teacher: Any, *, adapted: bool, needs: frozenset[str] = frozenset(), world_size: int = 1
) -> None:
    """Refuse a teacher that cannot be placed as `teacher_placement` says, before anything is loaded.

    Args:
        teacher: a name, a model, a `Teacher` or None, as the trainer was given it.
        adapted: whether the student is trained with a PEFT adapter.
        needs: what the method needs of its teacher.
        world_size: number of processes.

    Raises:
        ConfigurationError: naming what was expected.
    """
    placement = args.teacher_placement
    if is_remote(teacher) and placement not in ("auto", "remote"):
        raise ConfigurationError(
            f"Got `teacher_placement: {placement}` with the teacher {teacher!r}, which runs elsewhere. Set `remote`, "
            "or name the teacher by folder or Hub id."
        )
    if placement == "auto":
        return
    if placement == "remote" and not is_remote(teacher):
        raise ConfigurationError(
            f"Got `teacher_placement: remote` with the teacher {_named(teacher)}; expected the address of a server, "
            "such as `http://127.0.0.1:8000`. Start one with `distill-trainers serve-teacher`."
        )
    if placement == "adapter_off":
        _check_adapter_off(args, teacher, adapted, needs)
    elif isinstance(teacher, Teacher) and getattr(teacher, "placement", None) not in ("auto", placement):
        if not (placement == "cached" and isinstance(teacher, CachedTeacher)):
            raise ConfigurationError(
                f"Got `teacher_placement: {placement}` with a {type(teacher).__name__}, which is placed already. Leave "
                "`teacher_placement` out, or pass a model or its name."
            )
    elif PLACEMENTS[placement].by_name:
        _check_by_name(args, teacher, world_size)
    elif PLACEMENTS[placement].has_body:
        _refuse_other_placers(args, {"device_map", "quantization_config"})


def _check_adapter_off(args: DistillConfig, teacher: Any, adapted: bool, needs: frozenset[str]) -> None:
    if teacher is not None:
        raise ConfigurationError(
            f"Got `teacher_placement: adapter_off` and the teacher {_named(teacher)}; expected no teacher: it is the "
            "student without its adapter. Leave the teacher out, or take another placement."
        )
    if not adapted:
        raise ConfigurationError(
            "Got `teacher_placement: adapter_off` with a student that has no adapter; expected `peft_config` "
            "(`use_peft: true` in a recipe) or a PeftModel: the teacher is what the adapter is put on."
        )
    if "completions" in needs:
        raise ConfigurationError(
            "Got `teacher_placement: adapter_off` with `teacher_mix_alpha` above 0, which runs student and teacher in "
            "one decode loop, but they share their weights. Set `teacher_mix_alpha: 0`."
        )
    if args.teacher_model_init_kwargs:
        raise ConfigurationError(
            "Got `teacher_model_init_kwargs` with `teacher_placement: adapter_off`, where nothing is loaded for the "
            "teacher. Leave them out; `model_init_kwargs` are those of the shared base."
        )


def _check_by_name(args: DistillConfig, teacher: Any, world_size: int) -> None:
    placement = args.teacher_placement
    settings: Mapping[str, Any] = args.teacher_model_init_kwargs or {}  # type: ignore[assignment]  # parsed by now
    if teacher is not None and not isinstance(teacher, str):
        raise ConfigurationError(
            f"Got `teacher_placement: {placement}` with a {type(teacher).__name__} in memory; expected a folder or Hub "
            "id, since it acts while weights are loaded. Pass the teacher by name."
        )
    if placement == "device_map":
        if world_size > 1 and not isinstance(settings.get("device_map"), Mapping):
            raise ConfigurationError(
                f"Got `teacher_placement: device_map` in a launch of {world_size} processes, each of which would "
                "spread a teacher of its own over all devices. Start one process, name the devices "
                '(`teacher_model_init_kwargs: {device_map: {"": 0}}`), or take `zero3` or `fsdp2`.'
            )
        return
    _refuse_other_placers(args, {"device_map", "quantization_config"})


def _refuse_other_placers(args: DistillConfig, names: set[str]) -> None:
    found = sorted(names & (args.teacher_model_init_kwargs or {}).keys())  # type: ignore[union-attr]  # parsed by now
    if found:
        raise ConfigurationError(
            f"Got `teacher_placement: {args.teacher_placement}` and `{found[0]}` in `teacher_model_init_kwargs`, which "
            "both say how the teacher is loaded. Leave one of them out."
        )


def _named(teacher: Any) -> str:
    return "None" if teacher is None else repr(teacher) if isinstance(teacher, str) else type(teacher).__name__
