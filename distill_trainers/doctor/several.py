"""What several teachers take: each holds its weights all the time, and they answer one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..teachers.members import Members, composed_of
from .launch import Launch
from .memory import MemoryEstimate, Workload, estimate
from .shapes import ModelShape
from .work import BYTES, placement_of

if TYPE_CHECKING:
    from ..trainers import DistillConfig


@dataclass(frozen=True)
class TeacherOnPaper:
    """One of several teachers.

    Attributes:
        shape: None where it could not be read.
        placement: as `Case.placement`.
        dtype: of its weights, as text.
        shares: whether another one holds its weights: both are adapters on one base, or one is the other's base.
    """

    shape: ModelShape | None
    placement: str
    dtype: str = "float32"
    shares: bool = False


def on_paper(
    members: Members,
    args: DistillConfig,
    launch: Launch,
    student: str,
    read: Callable[[str, Any], tuple[ModelShape | None, str]],
    *,
    adapted: bool,
) -> dict[str, TeacherOnPaper]:
    """Return the teachers that have a say, by name.

    Args:
        student: its name.
        read: shape and dtype of a model by its name, under a teacher's options.
        adapted: whether the student trains an adapter, below which is what it was before training.
    """
    composed = composed_of(args, members)
    used = {part for weights in composed.values() for part in weights}
    teachers: dict[str, TeacherOnPaper] = {}
    bases: set[str] = set()
    for name, member in members.items():
        if composed and name not in used:
            continue
        if member.is_initial and adapted:
            teachers[name] = TeacherOnPaper(None, "adapter_off", shares=True)
            continue
        given = student if member.is_initial else member.given
        placement = placement_of(member.options, given, launch, cached=False)
        shape, dtype = read(str(given), member.options) if isinstance(given, str) else (None, "float32")
        base = repr((given, placement, member.options.teacher_model_init_kwargs))
        teachers[name] = TeacherOnPaper(shape, placement, dtype, shares=base in bases)
        bases.add(base)
    return teachers


def estimate_several(
    student: ModelShape, teachers: Mapping[str, TeacherOnPaper], work: Workload, launch: Launch
) -> MemoryEstimate:
    """Estimate the memory of one rank: what all teachers hold, and at each moment the most that one of them takes."""
    held: dict[str, float] = {}
    host: dict[str, float] = {}
    moments: dict[str, dict[str, float]] = {}
    for name, teacher in teachers.items():
        own = replace(work, teacher_bytes=BYTES.get(teacher.dtype, 4.0))
        need = estimate(student, teacher.shape, own, launch, teacher.placement)
        for into, parts in ((held, need.held), (host, need.host)):
            weights = {} if teacher.shares else {f"teacher {name}": parts.get("teacher", 0.0)}
            into |= {part: size for part, size in {**parts, "teacher": 0.0, **weights}.items() if size}
        for moment, parts in need.moments.items():
            most = moments.setdefault(moment, {})
            if sum(parts.values()) > sum(most.values()):
                moments[moment] = dict(parts)
    return MemoryEstimate(held, moments, host)
