"""What a run has left on disk: its log, its record, its scores, its evaluation. Nothing of it is trusted or run."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.results import FILE_NAME as EVALUATION_NAME
from ..evaluation.results import EvaluationResults
from ..exceptions import CheckpointError, ConfigurationError
from ..run_files import SAMPLES_NAME, find_last_complete_checkpoint, read_record
from ..trainers.lifecycle.checkpoints import TRAINER_STATE_NAME

METRICS_NAME = "metrics.json"
_EVALUATION_PLACES = (EVALUATION_NAME, f"evaluation/{EVALUATION_NAME}")
_HOW_TO_MEND = "Point to another run, or take the file away: the report then does without it."

Point = tuple[float, float]


@dataclass
class Run:
    """One run, as far as it can be read.

    Attributes:
        name: of its folder; no two runs of a report have the same.
        best_step: at which it scored best, by the setting `metric_for_best_model`; 0 where it did not look.
        history: entries of the trainer's log, each with its `step`.
        record: `run.json`; empty where there is none.
        samples: texts by `prompt` and by who wrote them, as the training left them: those of its last evaluation.
        notes: what could not be read, for the reader of the report.
    """

    name: str
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    best_step: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    evaluation: EvaluationResults | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def was_trained(self) -> bool:
        """Whether it is more than an evaluation."""
        return bool(self.history or self.record or self.metrics)

    def curve(self, name: str) -> list[Point]:
        """Return (step, value) of a logged metric, in the order of the log; values that are not finite are left out."""
        points: list[tuple[Any, Any]] = [(entry["step"], entry.get(name)) for entry in self.history]
        return [(float(step), float(value)) for step, value in points if is_number(value)]

    def logged(self) -> list[str]:
        """List the names of all that was logged as a number, in the order of their first time."""
        return list(dict.fromkeys(name for entry in self.history for name, value in entry.items() if is_number(value)))

    def total(self, name: str) -> float | None:
        """Sum up a logged metric."""
        values = [value for _, value in self.curve(name)]
        return sum(values) if values else None

    @property
    def sessions(self) -> list[dict[str, Any]]:
        return [session for session in self.record.get("sessions", []) if isinstance(session, dict)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(paths: Sequence[str | Path], evaluation: str | Path | None = None) -> list[Run]:
    """Read runs by the folders that they left; see `read_run`.

    Args:
        evaluation: results to show with the first run, in place of its own.

    Raises:
        ConfigurationError, CheckpointError, DatasetError: a run that is not there, or that is damaged.
    """
    if not paths:
        raise ConfigurationError("Got no run; expected the folder of at least one (the `output_dir` of its recipe).")
    runs = [read_run(path) for path in paths]
    if evaluation is not None:
        runs[0].evaluation = EvaluationResults.load(evaluation)
    _give_names(runs, [Path(path) for path in paths])
    return runs


def read_run(path: str | Path) -> Run:
    """Read a run from its output directory or a checkpoint, or an evaluation alone from its file or folder.

    Raises:
        ConfigurationError: there is no run.
        CheckpointError, DatasetError: its log, scores or evaluation are damaged.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        return Run(path.parent.name or path.stem, evaluation=EvaluationResults.load(path))
    if not path.is_dir():
        parent = path.parent
        near = sorted(child.name for child in parent.iterdir() if child.is_dir()) if parent.is_dir() else []
        raise ConfigurationError(
            f"There is no run at {str(path)!r}; expected the `output_dir` of a recipe. "
            f"Folders beside it: {', '.join(near[:10]) or 'none'}."
        )
    run = Run(path.resolve().name, record=read_record(path))
    _read_log(path, run)
    run.metrics = _read_json(path / METRICS_NAME, dict)
    run.samples = _read_samples(path, run.metrics)
    for place in _EVALUATION_PLACES:
        if (path / place).is_file():
            run.evaluation = EvaluationResults.load(path / place)
            break
    if not run.was_trained and run.evaluation is None:
        raise ConfigurationError(
            f"The folder {str(path)!r} holds no run: none of {TRAINER_STATE_NAME}, run.json, {METRICS_NAME}, "
            f"{EVALUATION_NAME}, and no whole checkpoint. Point to the `output_dir` of a recipe."
        )
    return run


def _read_log(folder: Path, run: Run) -> None:
    """The log of the run's end, or of its newest checkpoint if that goes further."""
    states: list[dict[str, Any]] = []
    damaged: CheckpointError | None = None
    checkpoint = find_last_complete_checkpoint(folder)
    for place in (folder, checkpoint and Path(checkpoint)):
        if place:
            try:
                states.append(_read_json(place / TRAINER_STATE_NAME, dict))
            except CheckpointError as error:
                damaged = error
    best = max(states, key=_steps, default={})
    if damaged is not None:
        if not best:
            raise damaged
        run.notes.append(f"{TRAINER_STATE_NAME} is damaged; the curves are those of the newest whole checkpoint.")
    history = best.get("log_history", [])
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    run.history = [entry for entry in entries if is_number(entry.get("step"))]
    run.steps = _steps(best)
    run.best_step = _steps(best, "best_global_step")


def _read_samples(folder: Path, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of `samples.jsonl` from its last step, else those of `metrics.json`; damaged lines are left out."""
    rows: list[dict[str, Any]] = []
    file = folder / SAMPLES_NAME
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):  # half-written by a run that was killed
            row = json.loads(line)
            if isinstance(row, dict) and is_number(row.get("step")):
                rows.append(row)
    samples: Any = [row for row in rows if row["step"] == rows[-1]["step"]] or metrics.get("samples")
    return [row for row in samples if isinstance(row, dict)] if isinstance(samples, list) else []


def _steps(state: dict[str, Any], name: str = "global_step") -> int:
    return int(state[name]) if is_number(state.get(name)) else 0


def _read_json(file: Path, kind: type) -> Any:
    """What a file of JSON holds; empty where there is no such file.

    Raises:
        CheckpointError: it is something else.
    """
    if not file.is_file():
        return kind()
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}. {_HOW_TO_MEND}") from error
    if not isinstance(read, kind):
        raise CheckpointError(
            f"{str(file)!r} holds a {type(read).__name__}, expected a {kind.__name__}. {_HOW_TO_MEND}"
        )
    return read


def _give_names(runs: list[Run], paths: list[Path]) -> None:
    """Names that tell the runs apart: with their parent's where two folders are called alike, then by number."""
    for names in (lambda i: runs[i].name, lambda i: f"{paths[i].resolve().parent.name}/{runs[i].name}"):
        shown = [names(i) for i in range(len(runs))]
        if len(set(shown)) == len(shown):
            break
    else:
        shown = [f"{name} ({i})" for i, name in enumerate((run.name for run in runs), 1)]
    for run, name in zip(runs, shown, strict=True):
        run.name = name
