"""All checks, in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .alternatives import Arrangement, all_placements
from .case import Case
from .disk import check_disk, checkpoint_bytes, num_checkpoints
from .findings import Finding, Severity, ranked
from .lengths import check_lengths
from .memory import MemoryEstimate
from .pace import Pace, Rates, pace_of
from .precision import check_precision
from .room import Room, check_memory, memory_of, room_for
from .teacher import check_answers, check_cache
from .tokenizers import check_tokens

Check = Callable[[Case], Iterator[Finding]]
# Nothing of these loads a weight.
CHEAP: tuple[Check, ...] = (check_tokens, check_lengths, check_precision, check_memory, check_disk, check_cache)


@dataclass
class Diagnosis:
    """What the doctor says.

    Attributes:
        memory, room: of one rank, where sizes are known.
        placements: with `gpus`, every way to place student and teacher.
    """

    case: Case
    findings: list[Finding]
    memory: MemoryEstimate | None = None
    room: Room | None = None
    pace: Pace | None = None
    placements: list[Arrangement] = field(default_factory=list)

    def count(self, severity: Severity) -> int:
        return sum(finding.severity is severity for finding in self.findings)

    def exit_status(self, *, strict: bool = False) -> int:
        """Return 0: healthy; 2: errors; 1: warnings, which count only if `strict`."""
        if self.count(Severity.ERROR):
            return 2
        return 1 if strict and self.count(Severity.WARNING) else 0

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints: sizes in bytes, times in seconds."""
        case, pace = self.case, self.pace
        shapes = {"student": case.student_shape, "teacher": case.teacher_shape}
        need = self.memory
        return {
            "method": type(case.args).__name__.removesuffix("Config").lower(),
            "student": case.student,
            "teacher": case.teacher,
            "launch": asdict(case.launch),
            "placement": case.placement,
            "teachers": {name: teacher.placement for name, teacher in case.teachers.items()},
            "parameters": {name: None if shape is None else shape.parameters for name, shape in shapes.items()},
            "steps": case.steps,
            "memory": None
            if need is None
            else {"peak": need.peak, "at": need.highest, "held": need.held, "moments": need.moments, "host": need.host},
            "available": None if self.room is None else self.room.bytes,
            "checkpoints": {"bytes": checkpoint_bytes(case), "at_once": num_checkpoints(case)},
            "operations_per_step": None if pace is None else pace.operations,
            "seconds_per_step": None if pace is None else pace.seconds,
            "placements": [
                {"student": p.student, "teacher": p.teacher, "bytes": p.need.peak, "host": p.host, "fits": p.fits}
                for p in self.placements
            ],
            "first_row": [{"text": text, "trained": trained} for text, trained in case.first_row],
            "teacher_row": [{"text": text, "trained": trained} for text, trained in case.teacher_row],
            "findings": [finding.as_dict() for finding in self.findings],
        }


def examine(
    case: Case, found: Sequence[Finding] = (), *, deep: bool = False, rates: Rates | None = None, remote: Any = None
) -> Diagnosis:
    """Run the checks.

    Args:
        found: findings of whoever made the case.
        deep: also load the teacher where there is a cache or a `remote` teacher to compare it with.
        rates: of the device, for the expected time.
        remote: a `Teacher` that should say what the local one says.
    """
    findings = list(found)
    for check in CHEAP:
        findings += check(case)
    stale = any(finding.concern == "teacher" and finding.severity is Severity.ERROR for finding in findings)
    if deep and not stale and case.tokenizer is not None:
        findings += check_answers(case, remote)
    return Diagnosis(
        case,
        ranked(findings),
        memory=memory_of(case),
        room=room_for(case),
        pace=pace_of(case, rates),
        placements=all_placements(case),
    )
