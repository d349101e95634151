"""Before, after and teacher: each score with its interval, and how much of the gap was closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation.results import FEWEST, EvaluationResults, MeasureInfo, ModelResults, Score
from ..evaluation.tables import number, share_of_gap, with_interval
from .charts import interval_chart
from .markup import Html, el, figure, join, section, stacked, table
from .runs import Run

_DIRECTIONS = {True: "higher is better", False: "lower is better", None: ""}


def in_order(results: EvaluationResults) -> list[ModelResults]:
    """Order models as they are shown: before, after, teacher."""
    return [*results.of_role("baseline"), *results.of_role("student"), *results.of_role("teacher")]


def style_of(results: EvaluationResults, model: ModelResults) -> int:
    """Return the same look in all charts: teacher, baseline, then the students."""
    roles = {"teacher": 0, "baseline": 1}
    return roles.get(model.role, 2 + [m.name for m in results.of_role("student")].index(model.name) % 6
                     if model.role == "student" else 0)  # fmt: skip


def heading(model: ModelResults) -> str:
    """Name a model: by what it is, if it has no name of its own."""
    return {"baseline": "before", "student": "after"}.get(model.name, model.name)


def how_to_evaluate() -> Html:
    return join(
        [
            el("code", "distill-trainers evaluate --run RUN"),
            " makes one for the run of a recipe, and ",
            el("code", "distill-trainers evaluate --student RUN --teacher TEACHER --baseline STUDENT --dataset DATA "
                       "--output_dir RUN"),
            " for any other; the next report shows it.",
        ]
    )  # fmt: skip


def scores(runs: Sequence[Run]) -> Html | None:
    """Show all scores of every evaluation; None where there is none."""
    evaluated = [(run, run.evaluation) for run in runs if run.evaluation is not None]
    parts = [
        join([el("h3", run.name) if len(runs) > 1 else None, *_of_evaluation(results)]) for run, results in evaluated
    ]
    return section("scores", "All scores: before, after, teacher", parts) if parts else None


def _of_evaluation(results: EvaluationResults) -> list[Any]:
    models, students = in_order(results), results.of_role("student")
    confidence = results.settings.get("confidence", 0.95)
    gaps = any(s.gap_closed for model in students for s in model.scores.values())
    changes = len(students) == 1 and any(s.difference for s in students[0].scores.values())
    suffixes = [f" by {heading(model)}" if len(students) > 1 else "" for model in students] if gaps else []
    rows = []
    for name, info in results.measures.items():
        of_models = [model.scores.get(name) for model in models]
        of_students = [model.scores.get(name) for model in students]
        cells = [stacked(with_interval(Score(s.value, s.low, s.high), info.unit)) if s else "–" for s in of_models]
        few = results.data.get("rows", FEWEST) < FEWEST
        cells += (
            [_change(s.difference, info, few) if s and s.difference else "–" for s in of_students] if changes else []
        )
        cells += [stacked(share_of_gap(s.gap_closed)) if s else "–" for s in of_students] if gaps else []
        rows.append([_measure(info), *cells])
    heads = ["", *map(heading, models), *(["change"] if changes else []), *(f"gap closed{end}" for end in suffixes)]
    caption = f"Scores with {100 * confidence:g} % intervals (bootstrap over prompts)"
    parts: list[Any] = [
        table(caption, heads, rows),
        el("p", "Gap closed: (after − before) / (teacher − before). 100 % is all of it. In brackets: teacher and "
                "student before training differ by no more than noise, or prompts are fewer than "
                f"{FEWEST}, so the share says little.", class_="note"),
    ]  # fmt: skip
    drawn = [_intervals(name, info, results, models) for name, info in results.measures.items()]
    return [*parts, el("details", el("summary", "The same scores drawn, with their intervals"),
                       el("div", drawn, class_="charts"))]  # fmt: skip


def _measure(info: MeasureInfo) -> Html:
    unit = info.unit if info.unit not in ("", "share") else ""
    note = ", ".join(filter(None, [unit, _DIRECTIONS[info.higher_is_better]]))
    return join([info.title, el("small", note) if note else None])


def _change(difference: Score, info: MeasureInfo, of_few: bool) -> Html:
    """The difference to before, with a word for its direction; few prompts have none."""
    sign = "+" if difference.value is not None and difference.value > 0 else ""
    shown = stacked(f"{sign}{with_interval(difference, info.unit)}")
    if difference.value is None or info.higher_is_better is None or of_few:
        return shown
    noise = difference.low is None or difference.high is None or difference.low <= 0 <= difference.high
    verdict = "within noise" if noise else "better" if (difference.value > 0) == info.higher_is_better else "worse"
    return join([shown, el("small", verdict, class_=f"verdict {verdict.split()[0]}")])


def _intervals(name: str, info: MeasureInfo, results: EvaluationResults, models: Sequence[ModelResults]) -> Html | None:
    scale = 100 if info.unit == "share" else 1
    rows = []
    for model in models:
        s = model.scores.get(name)
        if s is not None and s.value is not None:
            low, high = (None if v is None else v * scale for v in (s.low, s.high))
            rows.append(
                (heading(model), style_of(results, model), s.value * scale, low, high, number(s.value, info.unit))
            )
    if not rows:
        return None
    unit = "%" if info.unit == "share" else info.unit
    x_label = ", ".join(filter(None, [unit, _DIRECTIONS[info.higher_is_better]])) or "value"
    seeds = [(m, m.scores[name].per_seed) for m in models if name in m.scores and len(m.scores[name].per_seed) > 1]
    numbers = None
    if seeds:
        most = max(len(values) for _, values in seeds)
        seed_names = results.settings.get("seeds") or []
        heads = ["", *(f"seed {seed_names[i]}" if i < len(seed_names) else f"sample {i + 1}" for i in range(most))]
        rows_by_seed = [[heading(m), *(number(v, info.unit) for v in values)] for m, values in seeds]
        numbers = table(f"{info.title}, by seed", heads, rows_by_seed)
    return figure(info.title, interval_chart(rows, title=info.title, x_label=x_label), numbers=numbers)
