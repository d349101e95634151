"""Which models an evaluation compares, and which metrics models and data allow."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..exceptions import ConfigurationError, DatasetError
from .examples import ExampleSet
from .measures import METRICS, NEED_A_TEACHER, NEED_SAMPLES
from .settings import EvaluationSettings
from .subjects import Subject

_LIBRARIES = {"rouge_l": "rouge_score", "diversity": "sacrebleu"}


def make_subjects(
    students: Mapping[str, str | nn.Module],
    teacher: str | nn.Module | None,
    baseline: str | nn.Module | None,
    kwargs: Mapping[str, Any] | None,
    teacher_kwargs: Mapping[str, Any] | None,
    *,
    baseline_kwargs: Mapping[str, Any] | None = None,
    **shared: Any,
) -> list[Subject]:
    """Return teacher, baseline, students, in this order, each with what they share; nothing is loaded.

    Raises:
        ConfigurationError: no model at all, a name that is taken, or a model that is not there.
    """
    taken = [name for name in students if name in ("teacher", "baseline") or not str(name).strip()]
    if taken:
        raise ConfigurationError(f"A student is called {taken[0]!r}; expected another name than teacher and baseline.")
    sources: list[tuple[str, str, str | nn.Module | None, Mapping[str, Any] | None]] = [
        ("teacher", "teacher", teacher, kwargs if teacher_kwargs is None else teacher_kwargs),
        ("baseline", "baseline", baseline, kwargs if baseline_kwargs is None else baseline_kwargs),
        *((str(name), "student", source, kwargs) for name, source in students.items()),
    ]
    named = [(name, role, source, loading) for name, role, source, loading in sources if source is not None]
    subjects = [Subject(name, role, source, init_kwargs=loading, **shared) for name, role, source, loading in named]
    if not subjects:
        raise ConfigurationError("Got no model to evaluate; expected `students`, a `teacher` or a `baseline`.")
    return subjects


def choose_metrics(
    settings: EvaluationSettings, examples: ExampleSet, *, has_teacher: bool
) -> tuple[list[str], list[str]]:
    """Choose the metrics that models and data allow; say why others are left out.

    Raises:
        ConfigurationError, DatasetError: a metric that was asked for by name cannot be measured.
    """
    reasons: dict[str, str] = {}
    has_text = bool(examples.subsets["texts"]) or (has_teacher and bool(examples.subsets["prompts"]))
    for metric in METRICS:
        if metric in NEED_A_TEACHER and not has_teacher:
            reasons[metric] = "there is no teacher"
        elif metric in (NEED_SAMPLES - {"agreement"}) | {"accuracy", "speed"} and not examples.subsets["prompts"]:
            reasons[metric] = "the data has no prompts"
        elif metric in _LIBRARIES and importlib.util.find_spec(_LIBRARIES[metric]) is None:
            reasons[metric] = f"{_LIBRARIES[metric]}, of the extra `evaluation`, is not installed"
        elif metric == "rouge_l" and not examples.subsets["references"]:
            reasons[metric] = "the data has no references (a completion, or a column `references`)"
        elif metric in ("accuracy", "consistency") and not examples.subsets["questions"]:
            reasons[metric] = (
                "no row has an answer (a column `answer`, or one that answer_formats find in its reference)"
            )
        elif metric == "consistency" and len(settings.sampled_seeds) < 2:
            reasons[metric] = "it compares samples of several seeds at a temperature above 0"
        elif metric in ("perplexity", "calibration") and not has_text:
            reasons[metric] = "the data has no completions, and there is no teacher to write them"
    if settings.metrics is None:
        chosen = [metric for metric in METRICS if metric not in reasons]
        return chosen, [f"{metric} was left out: {reason}." for metric, reason in reasons.items()]
    for metric in settings.metrics:
        if metric in reasons:
            error = ConfigurationError if metric in NEED_A_TEACHER and not has_teacher else DatasetError
            raise error(f"Got the metric {metric}, but {reasons[metric]}. Leave it out, or give what it needs.")
    return [metric for metric in METRICS if metric in settings.metrics], []
