"""A bridge to lm-eval: its tasks beside our own scores. The library is optional, and imported only when asked for."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from typing import Any

from ..exceptions import ConfigurationError
from ..rationales.records import RecordStore, content_key
from .results import EvaluationResults, GapClosed, MeasureInfo, MeasureScore, Score
from .settings import EvaluationSettings
from .subjects import Subject

PREFIX = "lm_eval/"


def check_tasks(settings: EvaluationSettings) -> None:
    """Refuse tasks that cannot be run, before anything is loaded.

    Raises:
        ConfigurationError: lm-eval is not installed, or has no such task.
    """
    tasks = settings.lm_eval_tasks
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigurationError(
            f"Got `lm_eval_tasks: {tasks}`, but lm-eval is not installed: `pip install lm-eval`, or leave them out."
        )
    manager = _manager(settings)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigurationError(
            f"Got `lm_eval_tasks: {unknown[0]}`, which lm-eval {version('lm-eval')} does not have. `lm-eval ls tasks` "
            "lists its tasks; `lm_eval_include_path` names a folder of your own."
        )


def _manager(settings: EvaluationSettings) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=settings.lm_eval_include_path)


def add_harness_scores(
    results: EvaluationResults,
    subjects: Sequence[Subject],
    tokenizer: Any,
    settings: EvaluationSettings,
    cache: Path | None = None,
) -> None:
    """Run the tasks on every model and add their scores to `results`, as `lm_eval/<task>/<metric>`.

    Intervals are value ± z · standard error, as lm-eval gives it; those of prompts are not paired, so a gap that was
    closed has no interval, and counts as decided where baseline and teacher are further apart than their own.
    """
    if not settings.lm_eval_tasks:
        return
    for subject in subjects:
        scores = _run(subject, tokenizer, settings, cache)
        model = results.model(subject.name)
        for name, each in scores.items():
            z = NormalDist().inv_cdf((1 + settings.confidence) / 2)
            spread = z * each["stderr"] if each["stderr"] is not None else None
            low, high = (None, None) if spread is None else (each["value"] - spread, each["value"] + spread)
            model.scores[name] = MeasureScore(each["value"], low, high, over=name.removeprefix(PREFIX))
            title = " ".join(name.removeprefix(PREFIX).split("/")) + " (lm-eval)"
            results.measures.setdefault(name, MeasureInfo(title, "", each["higher_is_better"]))
    _compare(results)


def _run(subject: Subject, tokenizer: Any, settings: EvaluationSettings, cache: Path | None) -> dict[str, Any]:
    identity = [subject.facts.fingerprint, version("lm-eval"), settings.lm_eval_limit, settings.lm_eval_include_path]
    store = None if cache is None else RecordStore(cache / "lm_eval" / content_key(identity), what="scores of lm-eval")
    kept = {} if store is None else store.load()
    found: dict[str, Any] = {}
    for task in settings.lm_eval_tasks or []:
        if task not in kept:
            kept[task] = {"key": task, "scores": _evaluate(subject, tokenizer, task, settings)}
            if store is not None:
                store.append([kept[task]])
        found |= kept[task]["scores"]
    subject.release()
    return found


def _evaluate(subject: Subject, tokenizer: Any, task: str, settings: EvaluationSettings) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with subject.generating() as model:
        wrapped = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, device=str(subject.device)
        )
        how = {"limit": settings.lm_eval_limit, "task_manager": _manager(settings), "log_samples": False}
        answer = lm_eval.simple_evaluate(model=wrapped, tasks=[task], **how)
    return harness_scores(answer or {})


def harness_scores(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` answers, as value, standard error and direction by our name of the score."""
    found: dict[str, Any] = {}
    for task, metrics in answer.get("results", {}).items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or metric.endswith("_stderr") or not kind:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, int | float) and math.isfinite(error)
            name = f"{PREFIX}{task}/{metric}" + ("" if kind == "none" else f",{kind}")
            better = answer.get("higher_is_better", {}).get(task, {}).get(metric)
            found[name] = {"value": float(value), "stderr": float(error) if known else None, "higher_is_better": better}
    return found


def _compare(results: EvaluationResults) -> None:
    by_role = {model.role: model for model in results.models}
    before, teacher = by_role.get("baseline"), by_role.get("teacher")
    if before is None:
        return
    for student in results.of_role("student"):
        for name, own in student.scores.items():
            base = before.scores.get(name)
            if not name.startswith(PREFIX) or base is None or own.value is None or base.value is None:
                continue
            own.difference = Score(own.value - base.value)
            reached = teacher.scores.get(name) if teacher else None
            if reached is not None and reached.value is not None:
                own.gap_closed = _gap(own.value, base, reached)


def _gap(own: float, base: MeasureScore, reached: MeasureScore) -> GapClosed:
    assert base.value is not None and reached.value is not None
    gap = reached.value - base.value
    if not gap:
        return GapClosed(None)
    spreads = [each.high - each.value for each in (base, reached) if each.high is not None and each.value is not None]
    return GapClosed((own - base.value) / gap, decided=abs(gap) > math.hypot(*spreads))
