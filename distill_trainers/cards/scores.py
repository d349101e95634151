"""Scores in a model card: as a table for readers, and as `model-index` for the Hub."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..escaping import code, prose
from ..evaluation.measures import MEASURES
from ..evaluation.results import EvaluationResults, ModelResults, Score
from ..evaluation.tables import number, share_of_gap, with_interval
from ..run_files import shown

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_TITLES = {
    "loss": "Loss",
    "kl": "Forward KL to the teacher (nats/token)",
    "top1_agreement": "Top-1 agreement with the teacher",
    "accuracy": "Accuracy",
    "perplexity": "Perplexity",
    "teacher_perplexity": "Perplexity of the teacher",
}
for _measure in MEASURES.values():
    _unit = f" ({_measure.unit})" if _measure.unit not in ("", "share") else ""
    _TITLES.setdefault(_measure.name, f"{_measure.title}{_unit}")
    _TITLES[f"gap_closed_{_measure.name}"] = f"Gap closed: {_measure.title}"
_TASK = "text-generation"


@dataclass
class CardScores:
    """What a card tells of scores.

    Attributes:
        index: the same, for the metadata.
    """

    lines: list[str]
    index: list[EvalResult]


def scores_of_evaluation(results: EvaluationResults, student: str) -> CardScores | None:
    """Return scores with intervals, baseline, teacher and the gap closed; None if the student is not there.

    Args:
        student: the name of its folder or its Hub id, by which it is found among several.
    """
    of_student = _find(results, student)
    if of_student is None:
        return None
    others = [model for model in results.models if model.role in ("teacher", "baseline")]
    compared = [*others, of_student]
    data, rows = shown(str(results.data.get("name") or "evaluation set")), results.data.get("rows", 0)
    confidence = results.settings.get("confidence", 0.95)
    headings = {"teacher": "Teacher", "baseline": "Before", "student": "This model"}
    table = [["Measure", *(headings[model.role] for model in compared), "Gap closed"]]
    for name, info in results.measures.items():
        cells = []
        for model in compared:
            score = model.scores.get(name)
            cells.append("–" if score is None else with_interval(Score(score.value, score.low, score.high), info.unit))
        unit = f" ({info.unit})" if info.unit and info.unit != "share" else ""
        gap = of_student.scores[name].gap_closed if name in of_student.scores else None
        table.append([prose(f"{info.title}{unit}"), *cells, share_of_gap(gap)])
    text = f"On {rows} rows of {code(data)}, with {100 * confidence:.0f} % intervals by bootstrap over prompts."
    text += " The gap closed is (student − before) / (teacher − before); in brackets where it is noise."
    index = [
        _entry(name, info.title, score.value, data, _args(score, confidence))
        for name, info in results.measures.items()
        if (score := of_student.scores.get(name)) and score.value is not None
    ]
    return CardScores([text, "", *_markdown(table)], index)


def _find(results: EvaluationResults, student: str) -> ModelResults | None:
    students = results.of_role("student")
    named = [model for model in students if student in (model.source, model.name)]
    return named[0] if named else students[0] if len(students) == 1 else None


def _args(score: Any, confidence: float) -> dict[str, Any]:
    args: dict[str, Any] = {}
    if score.low is not None and score.high is not None:
        args |= {"confidence": confidence, "low": _short(score.low), "high": _short(score.high)}
    if score.gap_closed is not None and score.gap_closed.value is not None and score.gap_closed.decided:
        args["gap_closed"] = _short(score.gap_closed.value)
    return args


def scores_of_run(metrics: Mapping[str, float], data: str) -> CardScores:
    """Return the run's own evaluation by set: `eval_loss` of the only one, `eval_<set>_loss` of several."""
    sets = [key.removesuffix("_loss") for key in metrics if key.startswith("eval_") and key.endswith("_loss")]
    sets = [key for key in sets if f"{key}_tokens" in metrics]
    if not sets:
        return CardScores(["No evaluation was run."], [])
    heads = ["Value" if key == "eval" else prose(key.removeprefix("eval_")) for key in sets]
    told = {name: title for name, title in _TITLES.items() if all(f"{key}_{name}" in metrics for key in sets)}
    rows = [[title, *(f"{metrics[f'{key}_{name}']:.4f}" for key in sets)] for name, title in told.items()]
    tokens = ", ".join(f"{number(metrics[f'{key}_tokens'], 'tokens').removesuffix('.0')}" for key in sets)
    text = f"On given answers, token by token ({tokens} tokens). `distill-trainers evaluate` gives intervals."
    index = [
        _entry(name, title, metrics[f"{key}_{name}"], data if key == "eval" else key.removeprefix("eval_"), {})
        for key in sets
        for name, title in told.items()
        if not name.startswith(("teacher_", "gap_closed_")) and math.isfinite(metrics[f"{key}_{name}"])
    ]
    return CardScores([text, "", *_markdown([["Measure", *heads], *rows])], index)


def _entry(name: str, title: str, value: float, data: str, args: dict[str, Any]) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=_TASK,
        task_name="Text generation",
        dataset_type=data,
        dataset_name=data,
        metric_type=name,
        metric_name=title,
        metric_value=_short(value),
        metric_args=args or None,
    )


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _markdown(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]
