"""The diagnosis for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..escaping import terminal, visible
from ..redaction import redacted
from .disk import checkpoint_bytes, num_checkpoints
from .examine import Diagnosis
from .findings import Severity
from .rows import shortened

_COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print plan and cost, placements where hardware was named, findings with the worst first."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file has no width of its own
    console.print(_plan(diagnosis))
    if diagnosis.placements:
        console.print(_placements(diagnosis))
    if diagnosis.case.first_row:
        print_first_row(diagnosis, console)
    print_findings(diagnosis, console)
    errors, warnings = diagnosis.count(Severity.ERROR), diagnosis.count(Severity.WARNING)
    if errors or warnings:
        console.print(f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}.")
    else:
        console.print("Nothing wrong was found.")


def print_first_row(diagnosis: Diagnosis, console: Any) -> None:
    """Print the first row that is trained on, with its trained stretches between ⟦ and ⟧.

    Where the teacher reads another prompt, both views of the row stand side by side.
    """
    from rich.table import Table
    from rich.text import Text

    case, title = diagnosis.case, "The first row, trained between ⟦ and ⟧"
    if not case.teacher_row:
        console.print(Text(f"{title}:\n", style="bold").append_text(_stretches(case.first_row)), soft_wrap=True)
        return
    table = Table("the student reads", "the teacher reads", title=f"{title}, as both read it")
    table.add_row(_stretches(case.first_row), _stretches(case.teacher_row))
    console.print(table)


def _stretches(row: Sequence[tuple[str, bool]]) -> Any:
    from rich.text import Text

    text = Text()
    for stretch, trained in row:
        shown = visible(shortened(stretch))
        shown = f"⟦{shown}⟧" if trained else shown
        text.append(shown, style="green not bold" if trained else "dim not bold")
    return text


def print_findings(diagnosis: Diagnosis, console: Any) -> None:
    """Print a paragraph for each: what, and its remedy."""
    from rich.text import Text

    for finding in diagnosis.findings:
        line = Text(f"{finding.severity.value} ({finding.concern}): ", style=_COLOURS[finding.severity])
        line.append(visible(redacted(finding.what)), style="default not bold")
        line.append(f"\n    {visible(redacted(finding.remedy))}", style="dim")
        console.print(line, soft_wrap=True)


def _plan(diagnosis: Diagnosis) -> Any:
    from rich.table import Table

    case, need, pace, room = diagnosis.case, diagnosis.memory, diagnosis.pace, diagnosis.room
    title = redacted(f"{case.taught_by} → {case.student}")
    table = Table("", "", title=terminal(title, "italic"), show_header=False)
    if case.student_shape is not None:
        shape = case.student_shape
        table.add_row("Student", f"{shape.parameters:,} parameters, {shape.trainable:,} trained, {case.student_dtype}")
    if case.teacher_shape is not None:
        table.add_row(
            "Teacher", f"{case.teacher_shape.parameters:,} parameters, {case.teacher_dtype}, {case.placement}"
        )
    for name, teacher in case.teachers.items():
        sized = "its size is not known" if teacher.shape is None else f"{teacher.shape.parameters:,} parameters"
        shared = ", on weights that are held already" if teacher.shares else ""
        table.add_row(f"Teacher {terminal(name)}", f"{sized}, {teacher.dtype}, {teacher.placement}{shared}")
    launch = case.launch
    table.add_row("Launch", f"{launch.strategy}, {launch.processes} process{'es' * (launch.processes != 1)}")
    if case.steps:
        about = " (an estimate: not all rows are known yet)" if case.steps_are_estimated else ""
        table.add_row("Optimiser steps", f"{case.steps:,}{about}")
    if need is not None:
        for name, size in need.held.items():
            table.add_row(f"Held: {name}", gib(size))
        for name, size in need.moments[need.highest].items():
            table.add_row(f"At {need.highest}: {name}", gib(size))
        table.add_row("Peak of a process", f"{gib(need.peak)} of {gib(room.bytes)} ({room.what})" if room else "")
        if need.host:
            table.add_row("Offloaded, all processes", gib(sum(need.host.values()) * launch.per_machine))
    if checkpoint_bytes(case):
        table.add_row("Checkpoints", f"{num_checkpoints(case)} at once, {gib(checkpoint_bytes(case))} each")
    if pace is not None:
        work = f"{pace.operations / 1e12:,.3g} · 10¹² operations"
        seconds = f", at least {lasting(pace.seconds)} ({pace.rates.source})" if pace.seconds and pace.rates else ""
        table.add_row("A step of a process", work + seconds)
        if pace.seconds and case.steps:
            table.add_row("All steps", f"at least {lasting(pace.seconds * case.steps)}")
    return table


def _placements(diagnosis: Diagnosis) -> Any:
    """One row for each placement of the teacher, one column for each launch of the student."""
    from rich.table import Table

    students = list(dict.fromkeys(p.student for p in diagnosis.placements))
    gpus, room = diagnosis.case.gpus, diagnosis.room
    assert gpus is not None and room is not None
    title = f"GiB per GPU, {gpus.count} of {gpus.gigabytes:g} GB ({room.bytes / 2**30:,.1f} GiB to use; + on the host)"
    table = Table("teacher \\ student", *students, title=title)
    for teacher in dict.fromkeys(p.teacher for p in diagnosis.placements):
        cells = []
        for student in students:
            fit = next((p for p in diagnosis.placements if (p.student, p.teacher) == (student, teacher)), None)
            cells.append("" if fit is None else _cell(fit))
        table.add_row(teacher, *cells)
    return table


def _cell(placement: Any) -> str:
    host = f" + {placement.host / 2**30:,.0f}" if placement.host else ""
    text = f"{placement.need.peak / 2**30:,.1f}{host}"
    return text if placement.fits else f"[red]({text})[/red]"


def gib(size: float) -> str:
    """Write bytes in the unit that tells something."""
    if size >= 2**30:
        return f"{size / 2**30:,.2f} GiB"
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 or not size else f"{size / 2**10:,.1f} KiB"


def lasting(seconds: float) -> str:
    """Write a time in the unit that tells something."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
