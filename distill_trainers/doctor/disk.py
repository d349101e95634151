"""Is there as much disk as checkpoints, the student and a teacher cache are going to take?"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from .case import Case
from .findings import Finding, error, warning

_TIGHT = 0.8


def check_disk(case: Case) -> Iterator[Finding]:
    """Compare what a run writes, by file system, with what is free; nothing for hardware that is not here."""
    if case.gpus is not None:
        return
    needs: dict[int, tuple[Path, dict[str, float]]] = {}
    for folder, what, size in _written(case):
        place = _existing(folder)
        needs.setdefault(place.stat().st_dev, (place, {}))[1][what] = size
    for place, parts in needs.values():
        free, needed = shutil.disk_usage(place).free, sum(parts.values())
        if needed <= _TIGHT * free:
            continue
        listed = ", ".join(f"{what} {size / 2**30:,.2f}" for what, size in parts.items() if size)
        tell = error if needed > free else warning
        yield tell(
            "disk",
            f"The run writes about {needed / 2**30:,.2f} GiB to {str(place)!r}, where {free / 2**30:,.2f} GiB are free "
            f"(in GiB: {listed}).",
            "Set `save_total_limit`, or `save_only_model: true` (which cannot be resumed); store a sparser teacher "
            "cache (`teacher_cache_kind: topk`); or name a larger disk in `output_dir` or `teacher_cache`.",
        )


def checkpoint_bytes(case: Case) -> float:
    """Estimate one checkpoint: the student, and what its optimiser needs to go on."""
    shape, work = case.student_shape, case.work
    if shape is None or work is None:
        return 0.0
    saved = shape.trainable if case.peft else shape.parameters
    weights = saved * (2.0 if case.launch.by_deepspeed and work.mixed else work.weight_bytes)
    if case.args.save_only_model:
        return weights
    master = 4.0 * shape.trainable if case.launch.by_deepspeed else 0.0
    return weights + shape.trainable * work.state_bytes + master


def num_checkpoints(case: Case) -> int:
    """Count the checkpoints on disk at once, at the most; a new one is written before the oldest goes."""
    args = case.args
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    if strategy == "epoch":
        made = math.ceil(args.num_train_epochs)
    else:
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * case.steps))
        made = math.ceil(case.steps / every) if case.steps else 1
    limit = args.save_total_limit
    return made if not limit else min(made, limit + 1 + bool(args.load_best_model_at_end and limit == 1))


def _written(case: Case) -> Iterator[tuple[Path, str, float]]:
    output = Path(case.args.output_dir)
    count = num_checkpoints(case)
    yield output, f"{count} checkpoints", count * checkpoint_bytes(case)
    if case.student_shape is not None and case.work is not None:
        saved = case.student_shape.trainable if case.peft else case.student_shape.parameters
        yield output, "student", saved * case.work.weight_bytes
    if case.args.teacher_cache:
        yield Path(case.args.teacher_cache), "teacher cache", case.cache_bytes


def _existing(folder: Path) -> Path:
    absolute = folder.absolute()
    return next(parent for parent in (absolute, *absolute.parents) if parent.exists())
