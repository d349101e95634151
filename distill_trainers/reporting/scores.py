"""Before, after and teacher: each score with its interval, and how much of the gap was closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation.results import EvaluationResults, MeasureInfo, ModelResults, Score
from ..evaluation.tables import number, share_of_gap, with_interval
from .axes import short
from .charts import interval_chart
from .markup import Html, el, figure, join, missing, section, table
from .overview import titled
from .runs import Run

_DIRECTIONS = {True: "higher is better", False: "lower is better", None: ""}
# In the log of a run: scores that its evaluations have, with what the teacher itself would have.
_LOGGED = {"eval_kl": 0.0, "eval_top1_agreement": 1.0, "eval_perplexity": "eval_teacher_perplexity"}
_DEMO = {"kl": "nats/token", "top1_agreement": "share"}


def in_order(results: EvaluationResults) -> list[ModelResults]:
    """Models as they are told: before, after, teacher."""
    return [*results.of_role("baseline"), *results.of_role("student"), *results.of_role("teacher")]


def style_of(results: EvaluationResults, model: ModelResults) -> int:
    """The same look in all charts: teacher, baseline, then the students."""
    roles = {"teacher": 0, "baseline": 1}
    return roles.get(model.role, 2 + [m.name for m in results.of_role("student")].index(model.name) % 6
                     if model.role == "student" else 0)  # fmt: skip


def heading(model: ModelResults) -> str:
    """A model's name and what it is, where the name does not say so."""
    said = {"baseline": "before", "student": "after", "teacher": "teacher"}.get(model.role, model.role)
    return model.name if model.name == said else f"{model.name} ({said})" if model.name != model.role else said


def how_to_evaluate() -> Html:
    return join(
        [
            el("code", "distill-trainers evaluate --student RUN --teacher TEACHER --baseline STUDENT --dataset DATA "
                       "--output_dir RUN"),
            " puts an evaluation into the run's folder, and the next report shows it.",
        ]
    )  # fmt: skip


def scores(runs: Sequence[Run]) -> Html:
    """Scores of every run: those of its evaluation, else what its log tells."""
    parts: list[Any] = []
    for run in runs:
        own = [el("h3", run.name)] if len(runs) > 1 else []
        if run.evaluation is not None:
            own += _of_evaluation(run.evaluation)
        elif isinstance(run.metrics.get("scores"), dict):
            own += [
                _of_demo(run.metrics["scores"]),
                missing("These scores come without intervals. ", how_to_evaluate()),
            ]
        elif any(run.curve(name) for name in _LOGGED):
            own += [
                _of_log(run),
                missing("The log has neither intervals nor scores of sampled text. ", how_to_evaluate()),
            ]
        else:
            own.append(missing("Nothing was measured against the teacher. ", how_to_evaluate()))
        parts += own
    return section("scores", "Scores: before, after, teacher", parts)


def _of_evaluation(results: EvaluationResults) -> list[Any]:
    models, students = in_order(results), results.of_role("student")
    confidence = results.settings.get("confidence", 0.95)
    gaps = any(s.gap_closed for model in students for s in model.scores.values())
    suffixes = [f" of {model.name}" if len(students) > 1 else "" for model in students]
    changes = [f"Change{suffix}" for suffix in suffixes] if any(
        s.difference for model in students for s in model.scores.values()
    ) else []  # fmt: skip
    closed = [f"Gap closed{suffix}" for suffix in suffixes] if gaps else []
    rows = []
    for name, info in results.measures.items():
        found = [model.scores.get(name) for model in models]
        own = [model.scores.get(name) for model in students]
        cells = [with_interval(Score(s.value, s.low, s.high), info.unit) if s else "–" for s in found]
        cells += [_change(s.difference, info) if s and s.difference else "–" for s in own] if changes else []
        cells += [share_of_gap(s.gap_closed) if s else "–" for s in own] if closed else []
        rows.append([_measure(info), *cells])
    caption = f"Scores with {100 * confidence:g} % intervals (bootstrap over prompts)"
    parts: list[Any] = [
        table(caption, ["", *map(heading, models), *changes, *closed], rows),
        el("p", "Gap closed: (after − before) / (teacher − before). 100 % is all of it. In brackets: teacher and "
                "student before training differ by no more than noise, so the share says little.", class_="note"),
    ]  # fmt: skip
    if not gaps:
        parts.append(
            missing(
                "How much of the gap was closed is told where the evaluation has both ",
                el("code", "teacher"),
                " and ",
                el("code", "baseline"),
                ", the student before training.",
            )  # fmt: skip
        )
    drawn = [_intervals(name, info, results, models) for name, info in results.measures.items()]
    return [*parts, el("div", drawn, class_="charts")]


def _measure(info: MeasureInfo) -> Html:
    unit = info.unit if info.unit not in ("", "share") else ""
    told = ", ".join(filter(None, [unit, _DIRECTIONS[info.higher_is_better]]))
    return join([info.title, el("small", told) if told else None])


def _change(difference: Score, info: MeasureInfo) -> Html:
    """The difference to before, with a word for its direction."""
    sign = "+" if difference.value is not None and difference.value > 0 else ""
    shown = f"{sign}{with_interval(difference, info.unit)}"
    if difference.value is None or info.higher_is_better is None:
        return join([shown])
    noise = difference.low is None or difference.high is None or difference.low <= 0 <= difference.high
    verdict = "within noise" if noise else "better" if (difference.value > 0) == info.higher_is_better else "worse"
    return join([shown, " ", el("small", verdict, class_=verdict.split()[0])])


def _intervals(name: str, info: MeasureInfo, results: EvaluationResults, models: Sequence[ModelResults]) -> Html | None:
    scale = 100 if info.unit == "share" else 1
    rows = []
    for model in models:
        s = model.scores.get(name)
        if s is not None and s.value is not None:
            low, high = (None if v is None else v * scale for v in (s.low, s.high))
            rows.append((model.name, style_of(results, model), s.value * scale, low, high, number(s.value, info.unit)))
    if not rows:
        return None
    unit = "%" if info.unit == "share" else info.unit
    x_label = ", ".join(filter(None, [unit, _DIRECTIONS[info.higher_is_better]])) or "value"
    seeds = [(m, m.scores[name].per_seed) for m in models if name in m.scores and len(m.scores[name].per_seed) > 1]
    numbers = None
    if seeds:
        most = max(len(values) for _, values in seeds)
        told = results.settings.get("seeds") or []
        heads = ["", *(f"seed {told[i]}" if i < len(told) else f"sample {i + 1}" for i in range(most))]
        rows_by_seed = [[heading(m), *(number(v, info.unit) for v in values)] for m, values in seeds]
        numbers = table(f"{info.title}, by seed", heads, rows_by_seed)
    return figure(info.title, interval_chart(rows, title=info.title, x_label=x_label), numbers=numbers)


def _of_log(run: Run) -> Html:
    """First and last evaluation of the training itself."""
    rows = []
    for name, teacher in _LOGGED.items():
        curve = run.curve(name)
        if not curve:
            continue
        reached = run.curve(teacher)[-1:] if isinstance(teacher, str) else [(0.0, teacher)]
        before = short(curve[0][1]) if curve[0][0] == 0 else "–"
        rows.append([titled(name), before, short(curve[-1][1]), short(reached[0][1]) if reached else "–"])
    heads = [
        "",
        "before (step 0)",
        f"after (step {run.curve('eval_kl')[-1][0]:g})" if run.curve("eval_kl") else "after",
    ]
    return table("Scores on held-out data, from the log of the training", [*heads, "teacher"], rows)


def _of_demo(found: dict[str, Any]) -> Html:
    """`scores` of metrics.json: measures by model."""
    models = {str(name): values for name, values in found.items() if isinstance(values, dict)}
    names = list(dict.fromkeys(name for values in models.values() for name in values))
    order = sorted(models, key=lambda name: name == "teacher")
    rows = [
        [titled(name), *(_plain(models[model].get(name), _DEMO.get(name, "")) for model in order)] for name in names
    ]
    return table("Scores on held-out data, from metrics.json", ["", *order], rows)


def _plain(value: Any, unit: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return number(value, unit) if isinstance(value, float) else "–" if value is None else str(value)
