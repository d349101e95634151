"""Memory of one GPU for every way to place student and teacher, for hardware that need not be here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .case import Case
from .launch import Gpus, Launch
from .memory import MemoryEstimate
from .room import memory_of, room_for

_TEACHERS = ("replicate", "zero3", "zero3_offload", "fsdp2", "quantized-8bit", "quantized-4bit", "cached", "remote")


@dataclass(frozen=True)
class Arrangement:
    """One way, and what a rank takes: a row of the table.

    Attributes:
        student: `ddp`, `zero2`, `zero3`, `zero3_offload` or `fsdp2`.
        host: bytes that all ranks of one machine offload.
    """

    student: str
    teacher: str
    need: MemoryEstimate
    host: float
    fits: bool


def launches(gpus: Gpus, mixed_precision: str) -> dict[str, Launch]:
    """List the launches of accelerate_configs/, on these GPUs."""
    base = Launch(processes=gpus.count, machines=gpus.machines, mixed_precision=mixed_precision)
    named = {name: replace(base, strategy=name, name=name) for name in ("ddp", "zero2", "zero3", "fsdp2")}
    named["zero3_offload"] = replace(
        named["zero3"], name="zero3_offload", offloads_optimizer=True, offloads_parameters=True
    )
    if gpus.count == 1:
        return {"single": replace(base, strategy="single", name="single"), "zero3_offload": named["zero3_offload"]}
    return named


def all_placements(case: Case) -> list[Arrangement]:
    """Try every student's launch with every teacher's placement; none without `gpus` or without a teacher."""
    if case.gpus is None or case.teacher_shape is None:
        return []
    available = room_for(case).bytes
    rows = []
    for name, launch in launches(case.gpus, case.launch.mixed_precision).items():
        for placement in _TEACHERS:
            if launch.processes == 1 and placement in ("zero3", "fsdp2"):
                continue  # the same as replicate
            if placement == "cached" and case.samples:
                continue  # it cannot judge the student's own text
            need = memory_of(case, launch=launch, placement=placement)
            if need is not None:
                host = sum(need.host.values()) * launch.per_machine
                rows.append(Arrangement(name, placement, need, host, need.peak <= available))
    return rows
