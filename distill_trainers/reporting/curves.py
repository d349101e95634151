"""Curves of training: loss, its terms, and what evaluations in between have measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation.measures import MEASURES
from .charts import Series, legend, line_chart, short
from .markup import Html, el, figure, missing, section, table
from .overview import BOOKKEEPING, titled
from .runs import Run

# Of every entry of the log; or of the last one, which sums up the run.
_SILENT = {"epoch", "step", "total_flos", "train_loss", "train_runtime", "trained_tokens", "num_input_tokens_seen"}
_PROGRESS = {"learning_rate", "grad_norm", "rollouts", "completion_length", "padding_share"}
_TEACHER = "eval_teacher_"  # its own score on the same data, beside the student's
_SHOWN_NUMBERS = 60


def curves(runs: Sequence[Run]) -> Html:
    """Draw a chart for each name in the logs, with a line for each run."""
    logged = [run for run in runs if run.history]
    if not logged:
        advice = "No log of a training was found. It is in trainer_state.json, which "
        return section("curves", "Training", missing(advice, el("code", "distill-trainers train"), " writes; in Python "
                                                     "it is trainer.save_state()."))  # fmt: skip
    names = [name for name in dict.fromkeys(n for run in logged for n in run.logged()) if name not in _SILENT]
    names = [name for name in names if not name.endswith(BOOKKEEPING) and not name.startswith("train_")]
    names = [name for name in names if _without_teacher(name) is None or _without_teacher(name) not in names]
    evaluated = [name for name in names if name.startswith("eval_")]
    progress = [name for name in names if name in _PROGRESS]
    terms = [name for name in names if name not in evaluated and name not in progress]
    groups = (
        ("Loss and its terms", sorted(terms, key=lambda name: name != "loss")),
        ("Held-out data", evaluated),
        ("Progress", progress),
    )
    parts: list[Any] = [legend([(run.name, i) for i, run in enumerate(logged)])]
    for title, chosen in groups:
        drawn = [_chart(name, logged) for name in chosen]
        if drawn:
            parts += [el("h3", title), el("div", drawn, class_="charts")]
    skipped = {name: sum(_is_broken(entry.get(name)) for run in logged for entry in run.history) for name in names}
    broken = [f"{titled(name)} ({count})" for name, count in skipped.items() if count]
    if broken:
        parts.append(missing(f"Values that are no finite numbers are left out of the curves: {', '.join(broken)}."))
    if not evaluated:
        parts.append(
            missing(
                "Nothing was measured on held-out data while the run trained: set ",
                el("code", "eval_fraction"),
                " (or ",
                el("code", "eval_dataset"),
                ") and ",
                el("code", "eval_strategy: steps"),
                ".",
            )  # fmt: skip
        )
    return section("curves", "Training", parts)


def _is_broken(value: Any) -> bool:
    return isinstance(value, float) and (value != value or value in (float("inf"), float("-inf")))


def _chart(name: str, runs: Sequence[Run]) -> Html | None:
    series = [Series(run.name, run.curve(name), style) for style, run in enumerate(runs)]
    teacher = _TEACHER + name.removeprefix("eval_")
    if name.startswith("eval_"):
        series += [Series(f"{r.name}, its teacher", r.curve(teacher), i + 4) for i, r in enumerate(runs)]
    series = [curve for curve in series if curve.points]
    unit = _unit(name)
    if unit == "%":  # the log has shares of 1
        for curve in series:
            curve.points = [(step, 100 * value) for step, value in curve.points]
    title = titled(name)
    drawing = line_chart(series, title=title, x_label="optimiser step", y_label=unit)
    signs = [(curve.name, curve.style) for curve in series] if len(series) > len(runs) else []
    return figure(
        title,
        drawing,
        legend=legend(signs),
        note=Html(el("code", name)),
        numbers=_numbers(f"{title} (%)" if unit == "%" else title, series),
    )


def _without_teacher(name: str) -> str | None:
    """The student's score to which that of the teacher belongs."""
    return "eval_" + name.removeprefix(_TEACHER) if name.startswith(_TEACHER) else None


def _unit(name: str) -> str:
    stem = name.removeprefix("eval_")
    unit = MEASURES[stem].unit if stem in MEASURES else ""
    if (
        unit == "share"
        or stem.startswith("gap_closed_")
        or stem.endswith(("top1_agreement", "acceptance", "accuracy", "padding_share"))
    ):
        return "%"
    if unit:
        return unit
    if stem.endswith(("kl", "jsd", "divergence", "loss", "nll")):
        return "nats/token"
    units = {"completion_length": "tokens", "grad_norm": "norm", "learning_rate": "rate", "rollouts": "rollouts"}
    return "perplexity" if stem.endswith("perplexity") else units.get(stem, "value")


def _numbers(title: str, series: Sequence[Series]) -> Html:
    """The points as a table; of a long log every so many."""
    steps = sorted({step for curve in series for step, _ in curve.points})
    every = -(-len(steps) // _SHOWN_NUMBERS)
    chosen = [step for i, step in enumerate(steps) if i % every == 0 or i == len(steps) - 1]
    columns = [dict(curve.points) for curve in series]
    caption = title if every == 1 else f"{title}, every {every} logs"
    rows = [[f"{step:g}", *(short(values.get(step)) for values in columns)] for step in chosen]
    return table(caption, ["step", *(curve.name for curve in series)], rows)
