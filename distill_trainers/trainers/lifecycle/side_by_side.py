"""Completions of student and teacher side by side: into a file of the run, and to whatever tracks it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ...run_files import SAMPLES_NAME
from ...storage import append_lines
from ..config import DistillConfig

logger = logging.getLogger(__name__)

TABLE = "eval_samples"  # what trackers call it
_COLUMNS = ("step", "prompt", "reference", "student", "teacher")


@dataclass(frozen=True)
class SideBySide:
    """One prompt, what the data says to it, and what both models wrote; empty where one does not."""

    prompt: str
    reference: str = ""
    student: str = ""
    teacher: str = ""


def log_side_by_side(
    args: DistillConfig, callbacks: Sequence[TrainerCallback], step: int, samples: Sequence[SideBySide]
) -> None:
    """Append to `<output_dir>/samples.jsonl`, and send a table to TensorBoard, wandb and trackio where they track.

    One process does so.

    Args:
        callbacks: of the run, among which TensorBoard's may be.
    """
    if not samples:
        return
    rows = [{"step": step, **asdict(sample)} for sample in samples]
    file = Path(args.output_dir) / SAMPLES_NAME
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    append_lines(file, lines, "the samples", "Free some space and go on from the last checkpoint.")
    for callback in callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_text(TABLE, _markdown(rows), step)
    reports = args.report_to or []
    for name in ("wandb", "trackio"):
        if name in reports and importlib.util.find_spec(name) is not None:
            _send_table(importlib.import_module(name), name, rows)


def _send_table(tracker: Any, name: str, rows: list[dict[str, Any]]) -> None:
    """A table for the trackers that have one; a run goes on without it."""
    if name == "wandb" and tracker.run is None:
        return
    try:
        if name == "wandb":
            table = tracker.Table(columns=list(_COLUMNS), data=[[row[column] for column in _COLUMNS] for row in rows])
        else:
            import pandas

            table = tracker.Table(dataframe=pandas.DataFrame(rows))
        tracker.log({TABLE: table})
    except Exception as error:  # a tracker's trouble is no reason to end a run
        logger.warning("The samples could not be sent to %s: %s", name, error)


def _markdown(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return " ".join(str(value).split()).replace("|", "/")

    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(row[c]) for c in _COLUMNS)} |" for row in rows)])
