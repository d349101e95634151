"""Where a teacher's weights are, independent of the student's: names, and what each of them needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """One way to keep a teacher.

    Args:
        summary: where its weights are.
        shards: a process holds a share of them, and answers only when all processes ask.
        by_name: it acts while weights are loaded, so the teacher must be a folder or Hub id.
        has_body: weights of the teacher's own are loaded in the process that trains.
        unnamed: there is nothing to give as `teacher_model`.
        package: what must be installed, and the extra that installs it.
    """

    summary: str
    shards: bool = False
    by_name: bool = False
    has_body: bool = True
    unnamed: bool = False
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
        "the student's own base, or another adapter on it: nothing more in memory", has_body=False, unnamed=True
    ),
    "initial": Placement("the student before training, its adapter off, or a copy", has_body=False, unnamed=True),
    "ema": Placement("the student's weights, averaged over steps", has_body=False, unnamed=True),
    "live": Placement("the student itself: nothing more in memory", has_body=False, unnamed=True),
    "cached": Placement("its answers on disk", has_body=False, unnamed=True),
    "remote": Placement("behind a URL, in another process", has_body=False),
}

SELF_TEACHERS = ("initial", "ema", "live")  # states of the student that teach it


def is_collective(placement: str, zero_stage: int | None, fsdp_version: int | None) -> bool:
    """Tell whether a teacher so placed answers only when all processes of a launch ask."""
    if placement == "auto":
        return zero_stage == 3 or fsdp_version == 2
    return PLACEMENTS[placement].shards
