"""What was run, what it cost, and several runs side by side."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from ..evaluation.measures import MEASURES
from ..evaluation.results import EvaluationResults, MeasureScore, Score
from ..evaluation.tables import number, share_of_gap, tables_of, with_interval
from ..redaction import hidden
from .charts import short
from .markup import Html, el, join, missing, section, stacked, table
from .runs import Run

Fact = tuple[str, Callable[[Run], Any]]


def subtitle(run: Run) -> str:
    """Say in one line what run this is: method, teacher and student, steps, time."""
    record = run.record
    models = f"{record['teacher']} → {record['student']}" if record.get("teacher") and record.get("student") else None
    steps = f"{run.steps:,} optimiser steps" if run.steps else None
    parts = (run.name, record.get("method"), models, steps, duration(_seconds(run)))
    return " · ".join(str(part) for part in parts if part)


def what_was_run(runs: Sequence[Run]) -> Html:
    """Show recipe, models and versions of each run."""
    trained = [run for run in runs if run.was_trained]
    parts: list[Any] = []
    if trained:
        rows = [[title, *(_or_dash(tell(run)) for run in trained)] for title, tell in _FACTS]
        rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
        parts.append(table("Runs", ["", *(run.name for run in trained)], rows, numbers=False))
    for run in trained:
        heading = f"Recipe of {run.name}" if len(trained) > 1 else "Recipe"
        if run.record.get("recipe"):
            written = yaml.safe_dump(hidden(run.record["recipe"]), sort_keys=False, allow_unicode=True)
            note = el("p", "Settings that are not at their defaults; folders by their names.", class_="note")
            parts.append(el("details", el("summary", heading), note, el("pre", written), open=len(trained) == 1))
        elif not run.record:
            parts.append(
                missing(
                    f"What {run.name} was run with is not known, for it left no ",
                    el("code", "run.json"),
                    ". Every training writes one since it was introduced; train again, or resume the run, to have it.",
                )  # fmt: skip
            )
    for run in runs:
        if run.evaluation is not None:
            parts.append(_evaluated(run, run.evaluation, alone=len(runs) == 1))
        parts += [missing(f"{run.name}: {note}") for note in run.notes]
    return section("runs", "How: models, data, settings", parts)


def _or_dash(value: Any) -> Any:
    return "–" if value is None or value == "" else value


def _paper(run: Run) -> Any:
    paper = run.record.get("paper")
    if not isinstance(paper, dict) or not paper.get("title"):
        return None
    citation = f"{paper.get('authors', '')}: {paper['title']} ({paper.get('year', '')})"
    return f"{citation}, arXiv {paper['id']}" if paper.get("id") else citation


def _versions(run: Run) -> str | None:
    versions = run.record.get("versions")
    return ", ".join(f"{name} {value}" for name, value in versions.items()) if isinstance(versions, dict) else None


def moment(written: Any) -> str | None:
    """Write a time of ISO 8601 for people, to the minute."""
    try:
        time = datetime.datetime.fromisoformat(str(written))
    except ValueError:
        return None
    return time.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _recipe(name: str) -> Callable[[Run], Any]:
    def tell(run: Run) -> Any:
        recipe = run.record.get("recipe")
        return recipe.get(name) if isinstance(recipe, dict) else None

    return tell


def _parameters(run: Run) -> str | None:
    count = run.record.get("student_parameters")
    return f"{count:,}" if isinstance(count, int) else None


def _place(run: Run) -> str | None:
    device, processes = run.record.get("device"), run.record.get("processes", 1)
    return device if device is None or processes == 1 else f"{processes} x {device}"


_FACTS: tuple[Fact, ...] = (
    ("Method", lambda run: run.record.get("method")),
    ("Paper", _paper),
    ("Student", lambda run: run.record.get("student")),
    ("Parameters of the student", _parameters),
    ("Teacher", lambda run: run.record.get("teacher")),
    ("Training data", _recipe("dataset")),
    ("Optimiser steps", lambda run: f"{run.steps:,}" if run.steps else None),
    ("Device", _place),
    ("Versions", _versions),
    ("Started", lambda run: moment(run.sessions[0].get("started")) if run.sessions else None),
)


def _evaluated(run: Run, results: EvaluationResults, *, alone: bool) -> Html:
    """Models, data and versions of an evaluation."""
    data, environment = results.data, results.environment
    models = [[model.name, model.role, model.source] for model in results.models]
    versions = ", ".join(f"{name} {value}" for name, value in environment.items())
    notes = [el("li", note) for note in (*results.notes, *(f"{m.name}: {n}" for m in results.models for n in m.notes))]
    return el(
        "div",
        table("Models that were evaluated" + ("" if alone else f" for {run.name}"), ["", "role", "from"], models,
              numbers=False),
        el("p", f"Evaluated on {data.get('rows', 0):,} rows ({data.get('name', 'the data')}); the text that models "
                f"are made to read is that of {data.get('reference_text', 'the data')}. {moment(results.created)}. "
                f"{versions}."),
        el("ul", notes) if notes else None,
    )  # fmt: skip


# ---- Cost -----------------------------------------------------------------------------------------------------------


def cost(runs: Sequence[Run]) -> Html | None:
    """Show time, tokens, memory and energy of training; size and speed of the models."""
    parts: list[Any] = []
    trained = [run for run in runs if run.history or run.sessions]
    if trained:
        rows = [[title, *(_or_dash(tell(run)) for run in trained)] for title, tell in _COSTS]
        rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
        if rows:
            parts.append(table("Training", ["", *(run.name for run in trained)], rows))
    if any(run.sessions for run in trained) and not any(_total(run, "energy_joules") for run in trained):
        advice = "Energy was not counted: that takes an NVIDIA GPU (Volta or later) and "
        parts.append(el("p", advice, el("code", "pip install nvidia-ml-py"), ".", class_="note"))
    for run in runs:
        # The table of costs is the last that `tables_of` gives, where there is one.
        costs = [grid for grid in tables_of(run.evaluation) if grid.title.startswith("Cost")] if run.evaluation else []
        for grid in costs:
            parts.append(table(grid.title if len(runs) == 1 else f"{run.name}. {grid.title}", grid.headings, grid.rows))
    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    if evaluations and not any(model.cost for results in evaluations for model in results.models):
        parts.append(
            missing(
                "How fast the models decode is told by ",
                el("code", "distill-trainers evaluate"),
                ", whose metrics then have to include ",
                el("code", "speed"),
                ".",
            )  # fmt: skip
        )
    return section("cost", "Cost", parts) if parts else None


def _total(run: Run, name: str) -> float | None:
    values = [session[name] for session in run.sessions if isinstance(session.get(name), int | float)]
    return sum(values) if values else None


def _seconds(run: Run) -> float | None:
    recorded = _total(run, "seconds")
    runtimes = [value for _, value in run.curve("train_runtime")]
    return recorded if recorded is not None else (runtimes[-1] if runtimes else run.metrics.get("train_runtime"))


def duration(seconds: float | None) -> str | None:
    """Write seconds as people say them."""
    if not isinstance(seconds, int | float):
        return None
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min {rest} s"


def _trained_tokens(run: Run) -> str | None:
    tokens = run.total("trained_tokens")
    return f"{tokens:,.0f}" if tokens else None


def _sampled_tokens(run: Run) -> str | None:
    """Completions that the student wrote while it trained, in tokens."""
    lengths = dict(run.curve("completion_length"))
    tokens = sum(count * lengths.get(step, 0.0) for step, count in run.curve("rollouts"))
    return f"{tokens:,.0f}" if tokens else None


def _rate(run: Run) -> str | None:
    tokens, seconds = run.total("trained_tokens"), _seconds(run)
    return f"{tokens / seconds:,.0f}" if tokens and seconds else None


def _memory(run: Run) -> str | None:
    peaks = [session["peak_mib"] for session in run.sessions if isinstance(session.get("peak_mib"), int | float)]
    where = "of the process" if run.record.get("device") == "cpu" else "of the device"
    return f"{max(peaks):,.0f} MiB {where}" if peaks else None


def _energy(run: Run) -> str | None:
    joules = _total(run, "energy_joules")
    return f"{joules / 3600:,.1f} Wh ({short(joules)} J)" if joules else None


_COSTS: tuple[Fact, ...] = (
    ("Optimiser steps", lambda run: f"{run.steps:,}" if run.steps else None),
    ("Time, evaluation included", lambda run: duration(_seconds(run))),
    ("Trained tokens", _trained_tokens),
    ("Trained tokens a second", _rate),
    ("Tokens sampled from the student", _sampled_tokens),
    ("Largest memory", _memory),
    ("Energy", _energy),
)


# ---- Several runs ---------------------------------------------------------------------------------------------------


def comparison(runs: Sequence[Run]) -> Html | None:
    """Compare runs and the students of their evaluations, one column each."""
    parts: list[Any] = []
    settings = {run.name: run.record.get("recipe") or {} for run in runs}
    keys = list(dict.fromkeys(key for recipe in settings.values() for key in recipe))
    differing = [key for key in keys if len({str(recipe.get(key)) for recipe in settings.values()}) > 1]
    if differing:
        rows = [[key, *(_setting(settings[run.name].get(key), key) for run in runs)] for key in differing]
        caption = "Settings that differ (– is the default)"
        parts.append(table(caption, ["", *(run.name for run in runs)], rows, numbers=False))
    evaluated = [(run, run.evaluation) for run in runs if run.evaluation is not None]
    columns = [(run, results, model) for run, results in evaluated for model in results.of_role("student")]
    if columns:
        heads = [
            "",
            *(run.name if len(r.of_role("student")) == 1 else f"{run.name}: {m.name}" for run, r, m in columns),
        ]
        infos = {name: info for _, results in evaluated for name, info in results.measures.items()}
        scores = [
            [info.title, *(_cell(m.scores.get(name), info.unit) for _, _, m in columns)] for name, info in infos.items()
        ]
        caption = "Scores of the students, with intervals, and the gap that each closed (in brackets: noise)"
        parts.append(table(caption, heads, scores))
    logged = {run.name: _last_scores(run) for run in runs}
    names = list(dict.fromkeys(name for scores in logged.values() for name in scores))
    if names and len(evaluated) < len(runs):
        rows = [[titled(name), *(logged_number(name, logged[run.name].get(name)) for run in runs)] for name in names]
        parts.append(table("End of training: last evaluation of each run", ["", *(run.name for run in runs)], rows))
    return section("comparison", "Runs compared", parts) if parts else None


def _cell(score: MeasureScore | None, unit: str) -> Html:
    if score is None:
        return Html("–")
    gap = share_of_gap(score.gap_closed).partition(" [")[0]
    closed = el("small", f"{gap} of the gap", class_="interval") if gap != "–" else None
    return join([stacked(with_interval(Score(score.value, score.low, score.high), unit)), closed])


def _setting(value: Any, name: str) -> Any:
    return "–" if value is None else yaml.safe_dump(hidden(value, name)).removesuffix("...\n").strip()


def _last_scores(run: Run) -> dict[str, float]:
    """Last value of everything that the run's evaluations logged."""
    names = [name for name in run.logged() if name.startswith("eval_") and not name.endswith(BOOKKEEPING)]
    return {name: run.curve(name)[-1][1] for name in names}


# What the trainer logs of its own work, and no score.
BOOKKEEPING = ("_runtime", "_per_second", "_tokens", "_time")


def titled(name: str) -> str:
    """Write a logged name as a title: that of its measure, where it is one; and whose, of several teachers."""
    stem, _, teacher = name.removeprefix("eval_").partition("/")
    if teacher:
        return f"{titled(stem)}, {teacher}"
    if stem in MEASURES:
        return MEASURES[stem].title
    for prefix, words in (("gap_closed_", "Gap closed"), ("teacher_", "Teacher")):
        if stem.removeprefix(prefix) in MEASURES and stem not in _TITLES:
            return f"{words}: {MEASURES[stem.removeprefix(prefix)].title}"
    return _TITLES.get(stem, stem.replace("_", " ").capitalize())


def logged_number(name: str, value: float | None) -> str:
    """Write a logged value as the evaluation's tables do: shares as per cent."""
    stem = name.removeprefix("eval_").partition("/")[0]
    measure = MEASURES.get(stem) or MEASURES.get(stem.removeprefix("teacher_"))
    if stem.startswith("gap_closed_"):
        return number(value, "share")
    return number(value, measure.unit) if measure else short(value)


_TITLES = {
    "loss": "Loss",
    "grad_norm": "Norm of the gradient",
    "learning_rate": "Learning rate",
    "teacher_perplexity": "Perplexity of the teacher",
    "completion_length": "Tokens per rollout",
    "completion_clipped": "Share of rollouts that max_new_tokens cut off",
    "lm_loss": "Language-model loss",
    "rollouts": "Rollouts between two logs",
}


def unlike(evaluations: Sequence[EvaluationResults]) -> str:
    """In what evaluations differ that makes their scores hard to compare."""
    differences = []
    for title, tell in (
        ("data", lambda r: (r.data.get("name"), r.data.get("rows"))),
        ("the text that is read", lambda r: r.data.get("reference_text")),
        ("settings", lambda r: {k: v for k, v in r.settings.items() if not k.startswith(("shown", "token_", "batch"))}),
        ("teacher", lambda r: [m.fingerprint for m in r.of_role("teacher")]),
        ("baseline", lambda r: [m.fingerprint for m in r.of_role("baseline")]),
    ):
        if any(tell(other) != tell(evaluations[0]) for other in evaluations[1:]):
            differences.append(title)
    return " and ".join([", ".join(differences[:-1]), differences[-1]] if len(differences) > 1 else differences)
