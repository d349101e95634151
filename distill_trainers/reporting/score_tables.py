"""Before, after and teacher: each score with its interval, and how much of the gap was closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation.results import EvaluationResults, MeasureInfo, ModelResults, Score
from ..evaluation.tables import number, share_of_gap, with_interval
from .charts import interval_chart
from .markup import Html, el, figure, join, missing, section, stacked, table
from .overview import logged_number, titled
from .runs import Run

_DIRECTIONS = {True: "higher is better", False: "lower is better", None: ""}
# In the log of a run: scores that its evaluations have, with what the teacher itself would have.
_LOGGED: dict[str, float | str] = {
    "eval_kl": 0.0,
    "eval_top1_agreement": 1.0,
    "eval_acceptance": 1.0,
    "eval_perplexity": "eval_teacher_perplexity",
}
_DEMO = {"kl": "nats/token", "top1_agreement": "share"}


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
            el("code", "distill-trainers evaluate --student RUN --teacher TEACHER --baseline STUDENT --dataset DATA "
                       "--output_dir RUN"),
            " puts an evaluation into the run's folder, and the next report shows it.",
        ]
    )  # fmt: skip


def glance(runs: Sequence[Run]) -> Html | None:
    """Show how much of the gap each student closed, in a few measures; None where no evaluation tells."""
    tiles: list[Html] = []
    students = [(run, run.evaluation, m) for run in runs if run.evaluation for m in run.evaluation.of_role("student")]
    for run, results, model in students:
        names = [name for name in _GLANCE if (s := model.scores.get(name)) and s.gap_closed and s.gap_closed.decided]
        others = [*results.of_role("baseline"), *results.of_role("teacher")]
        names = [name for name in names if len(others) == 2 and all(name in other.scores for other in others)]
        most = _MOST_TILES if len(students) == 1 else 2
        tiles += [_tile(run if len(runs) > 1 else None, model, name, results) for name in names[:most]]
    return section("glance", "At a glance", el("ul", tiles, class_="tiles")) if tiles else None


_GLANCE = ("kl", "accuracy", "rouge_l", "student_text_kl", "perplexity", "bits_per_byte", "top1_agreement")
_MOST_TILES = 4


def _tile(run: Run | None, model: ModelResults, name: str, results: EvaluationResults) -> Html:
    info = results.measures[name]
    before, teacher = (results.of_role(role)[0].scores[name].value for role in ("baseline", "teacher"))
    score = model.scores[name]
    share, _, interval = share_of_gap(score.gap_closed).partition(" [")
    called = model.name if len(results.of_role("student")) > 1 else ""
    whose = ", ".join(filter(None, [run.name if run else "", called]))
    values = " → ".join(number(value, info.unit) for value in (before, score.value))
    return el(
        "li",
        el("p", f"{whose}: {info.title}" if whose else info.title, class_="who"),
        el("p", share, class_="big"),
        el("p", f"of the gap closed [{interval}" if interval else "of the gap closed"),
        el("p", f"{values}; teacher {number(teacher, info.unit)}".replace(" %", "\u00a0%")),
    )


def scores(runs: Sequence[Run]) -> Html:
    """Show the scores of every run: those of its evaluation, else what its log tells."""
    parts: list[Any] = []
    for run in runs:
        run_parts = [el("h3", run.name)] if len(runs) > 1 else []
        if run.evaluation is not None:
            run_parts += _of_evaluation(run.evaluation)
        elif isinstance(run.metrics.get("scores"), dict):
            run_parts += [
                _of_demo(run.metrics["scores"]),
                missing("These scores come without intervals. ", how_to_evaluate()),
            ]
        elif any(run.curve(name) for name in _LOGGED):
            run_parts += [
                _of_log(run),
                missing("The log has neither intervals nor scores of sampled text. ", how_to_evaluate()),
            ]
        else:
            run_parts.append(missing("Nothing was measured against the teacher. ", how_to_evaluate()))
        parts += run_parts
    return section("scores", "Scores: before, after, teacher", parts)


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
        cells += [_change(s.difference, info) if s and s.difference else "–" for s in of_students] if changes else []
        cells += [stacked(share_of_gap(s.gap_closed)) if s else "–" for s in of_students] if gaps else []
        rows.append([_measure(info), *cells])
    heads = ["", *map(heading, models), *(["change"] if changes else []), *(f"gap closed{end}" for end in suffixes)]
    caption = f"Scores with {100 * confidence:g} % intervals (bootstrap over prompts)"
    parts: list[Any] = [
        table(caption, heads, rows),
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
    note = ", ".join(filter(None, [unit, _DIRECTIONS[info.higher_is_better]]))
    return join([info.title, el("small", note) if note else None])


def _change(difference: Score, info: MeasureInfo) -> Html:
    """The difference to before, with a word for its direction."""
    sign = "+" if difference.value is not None and difference.value > 0 else ""
    shown = stacked(f"{sign}{with_interval(difference, info.unit)}")
    if difference.value is None or info.higher_is_better is None:
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


def _of_log(run: Run) -> Html:
    """First and last evaluation of the training itself."""
    rows = []
    for name, teacher in _LOGGED.items():
        curve = run.curve(name)
        if not curve:
            continue
        reached = run.curve(teacher)[-1:] if isinstance(teacher, str) else [(0.0, teacher)]
        before = curve[0][1] if curve[0][0] == 0 else None
        shown = (before, curve[-1][1], reached[0][1] if reached else None)
        rows.append([titled(name), *(logged_number(name, value) for value in shown)])
    heads = [
        "",
        "before (step 0)",
        f"after (step {run.curve('eval_kl')[-1][0]:g})" if run.curve("eval_kl") else "after",
    ]
    return table("Scores on held-out data, from the log of the training", [*heads, "teacher"], rows)


def _of_demo(measured: dict[str, Any]) -> Html:
    """`scores` of metrics.json: measures by model."""
    models = {str(name): values for name, values in measured.items() if isinstance(values, dict)}
    names = list(dict.fromkeys(name for values in models.values() for name in values))
    order = sorted(models, key=lambda name: name == "teacher")
    rows = [[titled(name), *(_plain(models[m].get(name), _DEMO.get(name, "")) for m in order)] for name in names]
    return table("Scores on held-out data, from metrics.json", ["", *order], rows)


def _plain(value: Any, unit: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return number(value, unit) if isinstance(value, float) else "–" if value is None else str(value)
