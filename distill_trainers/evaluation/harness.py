"""A bridge to lm-eval: its tasks beside our own scores. The library is optional, and imported only when asked for."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from typing import Any

from ..exceptions import ConfigurationError
from ..settings import require, shown
from ..storage import RecordStore, content_key
from .results import EvaluationResults, GapClosed, MeasureInfo, MeasureScore, Score
from .settings import EvaluationSettings
from .subjects import Subject

PREFIX = "lm_eval/"


class Harness:
    """Tasks of lm-eval, found and with their data at hand before any weights are loaded.

    Args:
        settings: `lm_eval_tasks` (names, or patterns such as `mmlu_*`), `lm_eval_include_path` and `lm_eval_limit`.

    Raises:
        ConfigurationError: lm-eval is not installed, has no such task, or cannot read the data of one.
    """

    def __init__(self, settings: EvaluationSettings):
        self.settings = settings
        self.tasks: list[str] = []
        if not settings.lm_eval_tasks:
            return
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigurationError(
                f"Got `lm_eval_tasks: {shown(settings.lm_eval_tasks)}`, but lm-eval is not installed: `pip install "
                "lm-eval`, or leave them out."
            )
        self._manager = _manager_that_has(settings.lm_eval_tasks, settings.lm_eval_include_path)
        for pattern in settings.lm_eval_tasks:
            self.tasks += [name for name in self._matching(pattern) if name not in self.tasks]
        for name in self.tasks:
            self._read_data(name)

    def _matching(self, pattern: str) -> list[str]:
        """Names of the tasks that a name or a pattern means."""
        names = self._manager.match_tasks([pattern])
        if names:
            return list(names)
        near = difflib.get_close_matches(pattern, self._manager.all_tasks, n=3)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ConfigurationError(
            f"Got `lm_eval_tasks: {pattern}`, which lm-eval {version('lm-eval')} does not have. {hint}"
            "`lm-eval ls tasks` lists its tasks; `lm_eval_include_path` names a folder of your own."
        )

    def _read_data(self, name: str) -> None:
        try:
            self._manager.load([name])
        except Exception as error:  # of a library of data, or of the task's own code: anything
            raise ConfigurationError(
                f"Got `lm_eval_tasks: {name}`, but lm-eval cannot load that task: {type(error).__name__}: {error}. "
                "Fix it, fetch its data once with the network there, or leave it out."
            ) from error

    def add_scores(
        self, results: EvaluationResults, subjects: Sequence[Subject], tokenizer: Any, cache: Path | None = None
    ) -> None:
        """Run the tasks on every model and add their scores to `results`, as `lm_eval/<task>/<metric>`.

        Intervals are value ± z · standard error, as lm-eval gives it; those of prompts are not paired, so a gap that
        was closed has no interval, and counts as decided where baseline and teacher are further apart than their own.
        """
        if not self.tasks:
            return
        z = NormalDist().inv_cdf((1 + self.settings.confidence) / 2)
        for subject in subjects:
            model = results.model(subject.name)
            for name, entry in self._run(subject, tokenizer, cache).items():
                spread = z * entry["stderr"] if entry["stderr"] is not None else None
                low, high = (None, None) if spread is None else (entry["value"] - spread, entry["value"] + spread)
                model.scores[name] = MeasureScore(entry["value"], low, high, over=name.removeprefix(PREFIX))
                title = " ".join(name.removeprefix(PREFIX).split("/")) + " (lm-eval)"
                results.measures.setdefault(name, MeasureInfo(title, "", entry["higher_is_better"]))
        _compare(results)

    def _run(self, subject: Subject, tokenizer: Any, cache: Path | None) -> dict[str, Any]:
        """Scores of a model; a task that it was scored on before is not run again."""
        settings = self.settings
        identity: list[Any] = [subject.facts.fingerprint, version("lm-eval"), settings.lm_eval_limit]
        identity += [settings.bootstrap_samples, _files_below(settings.lm_eval_include_path)]
        store = (
            None if cache is None else RecordStore(cache / "lm_eval" / content_key(identity), what="scores of lm-eval")
        )
        records = {} if store is None else store.load()
        scores: dict[str, Any] = {}
        for task in self.tasks:
            if task not in records:
                records[task] = {"key": task, "scores": self._evaluate(subject, tokenizer, task)}
                if store is not None:
                    store.append([records[task]])
            scores |= records[task]["scores"]
        subject.release()
        return scores

    def _evaluate(self, subject: Subject, tokenizer: Any, task: str) -> dict[str, Any]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        settings = self.settings
        with subject.generating() as model, _in_this_process():
            wrapped = HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, device=str(subject.device)
            )
            answer = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=[task],
                limit=settings.lm_eval_limit,
                bootstrap_iters=settings.bootstrap_samples,
                task_manager=self._manager,
                log_samples=False,
            )
        return harness_scores(answer or {})


def _manager_that_has(tasks: Sequence[str], folder: str | None) -> Any:
    """lm-eval's index of tasks. Its own is read from 14 000 files, so a folder that has all of them is enough."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        require(os.path.isdir(folder), "lm_eval_include_path", folder, "a folder with task files")
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(manager.all_subtasks):  # a group may name tasks that are not in the folder
            return manager
    return TaskManager(include_path=folder)


def _files_below(folder: str | None) -> list[Any]:
    """What tells whether anything in a folder of tasks has changed."""
    if not folder:
        return []
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


@contextlib.contextmanager
def _in_this_process() -> Iterator[None]:
    """lm-eval resamples in a pool of forks, which may hang beside threads and does not end with Ctrl-C."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def harness_scores(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Read an answer of `lm_eval.simple_evaluate`: value, standard error and direction by our name of the score."""
    table: dict[str, Any] = {}
    for task, metrics in answer.get("results", {}).items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or metric.endswith("_stderr") or not kind:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, int | float) and math.isfinite(error)
            name = f"{PREFIX}{task}/{metric}" + ("" if kind == "none" else f",{kind}")
            better = answer.get("higher_is_better", {}).get(task, {}).get(metric)
            table[name] = {"value": float(value), "stderr": float(error) if known else None, "higher_is_better": better}
    return table


def _compare(results: EvaluationResults) -> None:
    by_role = {model.role: model for model in results.models}
    before, teacher = by_role.get("baseline"), by_role.get("teacher")
    if before is None:
        return
    for student in results.of_role("student"):
        for name, after in student.scores.items():
            base = before.scores.get(name)
            if not name.startswith(PREFIX) or base is None or after.value is None or base.value is None:
                continue
            after.difference = Score(after.value - base.value)
            reached = teacher.scores.get(name) if teacher else None
            if reached is not None and reached.value is not None:
                after.gap_closed = _gap(after.value, base, reached)


def _gap(after: float, base: MeasureScore, reached: MeasureScore) -> GapClosed:
    assert base.value is not None and reached.value is not None
    gap = reached.value - base.value
    if not gap:
        return GapClosed(None)
    spreads = [end.high - end.value for end in (base, reached) if end.high is not None and end.value is not None]
    return GapClosed((after - base.value) / gap, decided=abs(gap) > math.hypot(*spreads))
