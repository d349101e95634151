"""What the doctor has found, ranked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """An error ends the run or spoils its result, a warning may; a note tells what is harmless or unseen."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        concern: which check found it: `tokens`, `lengths`, `precision`, `memory`, `disk`, `teacher`, `recipe`,
            `trust`.
    """

    severity: Severity
    concern: str
    what: str
    remedy: str

    @classmethod
    def of_error(cls, concern: str, error: Exception) -> Finding:
        """Make a finding of this package's error, whose message ends in what to do."""
        text = " ".join(str(error).split())
        for border in ("; expected ", ". "):
            what, separator, remedy = text.rstrip(".").rpartition(border)
            if separator:
                remedy = f"Expected {remedy}." if border.startswith(";") else f"{remedy}."
                return cls(Severity.ERROR, concern, f"{what}.", remedy)
        return cls(Severity.ERROR, concern, text, "Change what the message names.")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "severity": self.severity.value}


def error(concern: str, what: str, remedy: str) -> Finding:
    return Finding(Severity.ERROR, concern, what, remedy)


def warning(concern: str, what: str, remedy: str) -> Finding:
    return Finding(Severity.WARNING, concern, what, remedy)


def note(concern: str, what: str, remedy: str) -> Finding:
    return Finding(Severity.NOTE, concern, what, remedy)


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings, the worst first; equal ones in their order, each once."""
    order = list(Severity)
    return sorted(dict.fromkeys(findings), key=lambda finding: order.index(finding.severity))
