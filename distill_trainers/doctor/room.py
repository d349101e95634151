"""Is there as much memory as a step is going to take, and if not, what would fit?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..trainers.given.token_batches import copies_of_row
from .case import Case
from .findings import Finding, error, warning
from .memory import RESERVED, MemoryEstimate, estimate
from .several import estimate_several

# The formula is within these of measured peaks (docs/doctor.md), so that only what lies beyond is called an error.
_SURELY_TOO_MUCH, _TIGHT = 1.2, 0.9
_IMPORTS = 0.7 * 2**30  # what torch, transformers and the rest take of a process on a CPU
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Room:
    """Bytes that one rank may use, and of what."""

    bytes: float
    what: str


def room_for(case: Case) -> Room:
    """Tell the memory of one rank: a GPU's, or its part of this machine's."""
    import torch

    if case.gpus is not None:
        return Room(case.gpus.bytes - RESERVED, f"a GPU of {case.gpus.gigabytes:g} GB")
    if not case.launch.on_cpu and torch.cuda.is_available():
        # A process of a launch asks its own: each that is asked keeps a context of hundreds of MB.
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        count = min(case.launch.per_machine, torch.cuda.device_count())
        devices = [case.args.device] if launched else range(count)
        total = min(torch.cuda.mem_get_info(device)[0] for device in devices)
        return Room(total - RESERVED, f"free on {torch.cuda.get_device_name(devices[0])}")
    share = host_memory() / case.launch.per_machine - _IMPORTS
    shared = f", for each of {case.launch.per_machine} processes" if case.launch.per_machine > 1 else ""
    return Room(share, f"free memory of this machine{shared}")


def host_memory() -> float:
    """Count the bytes of this machine's memory that are free, within what its container may use."""
    import psutil

    free = float(psutil.virtual_memory().available)
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    return min(free, float(limit)) if limit.isdigit() else free


def memory_of(case: Case, **changes: object) -> MemoryEstimate | None:
    """Estimate memory for a case, or for the same with another `work`, `launch` or `placement`."""
    changed = replace(case, **changes)  # type: ignore[arg-type]
    if changed.student_shape is None or changed.work is None:
        return None
    if changed.teachers:
        return estimate_several(changed.student_shape, changed.teachers, changed.work, changed.launch)
    return estimate(changed.student_shape, changed.teacher_shape, changed.work, changed.launch, changed.placement)


def check_memory(case: Case) -> Iterator[Finding]:
    """Compare the peak of one rank with its memory, and what is offloaded with the host's memory."""
    need = memory_of(case)
    if need is None:
        return
    room = room_for(case)
    if need.peak > _TIGHT * room.bytes:
        largest = sorted({**need.held, **need.moments[need.highest]}.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {size / 2**30:,.1f}" for name, size in largest)
        tell = error if need.peak > _SURELY_TOO_MUCH * room.bytes else warning
        yield tell(
            "memory",
            f"A step takes about {need.peak / 2**30:,.1f} GiB per process at {need.highest}, and there are "
            f"{max(0.0, room.bytes) / 2**30:,.1f} GiB ({room.what}). The largest parts, in GiB: {parts}.",
            _remedy(case, room),
        )
    host = sum(need.host.values()) * case.launch.per_machine
    if host and case.gpus is None and host > _TIGHT * host_memory():
        yield error(
            "memory",
            f"{host / 2**30:,.1f} GiB are offloaded to this machine's memory, of which "
            f"{host_memory() / 2**30:,.1f} GiB are free.",
            "Offload less (`offload_param_device: none` for the student), use more machines, or train an adapter.",
        )


def _remedy(case: Case, room: Room) -> str:
    """What would fit, by the same estimate; the least change first."""
    tried: list[tuple[str, MemoryEstimate | None]] = []
    assert case.work is not None
    work, launch, rows = case.work, case.launch, case.work.rows
    if not work.checkpointing:
        tried.append(("`gradient_checkpointing: true`", memory_of(case, work=replace(work, checkpointing=True))))
    counted = case.args.per_device_train_tokens is not None
    fewest = copies_of_row(case.args) if counted else 1
    small = replace(work, checkpointing=True, rows=fewest, accumulation=work.accumulation * max(1, rows // fewest))
    if rows > fewest:
        setting = f"per_device_train_tokens: {work.length * fewest}" if counted else "per_device_train_batch_size: 1"
        also = f"`{setting}` with `gradient_accumulation_steps: {small.accumulation}`"
        tried.append((f"{also} and gradient checkpointing", memory_of(case, work=small)))
    if launch.processes > 1 and not launch.on_cpu:
        for strategy in ("zero2", "zero3"):
            if strategy > launch.strategy or launch.strategy == "ddp":
                placement = "zero3" if strategy == "zero3" and case.placement == "replicate" else case.placement
                other = replace(launch, strategy=strategy)
                tried.append((f"a {strategy} launch", memory_of(case, work=small, launch=other, placement=placement)))
    if work.rollout_rows > 1:
        one_row = replace(small, rollout_rows=1)
        tried.append(("`rollout_batch_size: 1` with all of that", memory_of(case, work=one_row)))
    if launch.strategy == "zero3" and not launch.offloads_optimizer:
        offloaded = replace(launch, offloads_optimizer=True, offloads_parameters=True)
        tried.append(("offloading the student to the host (ZeRO-3)", memory_of(case, launch=offloaded)))
    if case.placement in ("replicate", "zero3") and case.teacher_shape is not None and not case.samples:
        tried.append(("`teacher_cache`, filled ahead", memory_of(case, work=small, placement="cached")))
    fits = [f"{way} ({need.peak / 2**30:,.1f} GiB)" for way, need in tried if need and need.peak <= room.bytes * _TIGHT]
    if fits:
        return "By the same estimate these fit: " + "; ".join(fits[:3]) + "."
    best = min((need.peak for _, need in tried if need), default=0.0)
    still = f" (checkpointing, small batches and sharding leave {best / 2**30:,.1f} GiB)" if best else ""
    return f"Nothing that keeps these models fits{still}: train an adapter (`use_peft: true`), or use more GPUs."
