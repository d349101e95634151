"""Curves of training: loss, its terms, and what evaluations in between have measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation.measures import MEASURES
from .charts import Series, legend, line_chart, short
from .markup import Html, el, figure, join, missing, section, table
from .overview import BOOKKEEPING, titled
from .result import FIRST
from .runs import Run

# Of every entry of the log; or of the last one, which sums up the run.
_SILENT = {"epoch", "step", "total_flos", "train_loss", "train_runtime", "trained_tokens", "num_input_tokens_seen"}
_PROGRESS = {"learning_rate", "grad_norm", "rollouts", "completion_length", "completion_clipped", "padding_share"}
_TEACHER = "eval_teacher_"  # its own score on the same data, beside the student's
_GAP = "eval_gap_closed_"
_ALIKE = 0.01
_SHOWN_NUMBERS = 60


def curves(runs: Sequence[Run]) -> Html | None:
    """Draw a chart for each name in the logs, with a line for each run; None where there are evaluations alone."""
    if not any(run.was_trained for run in runs):
        return None
    logged = [run for run in runs if run.history]
    if not logged:
        advice = "No log of a training was found. It is in trainer_state.json, which "
        return section("curves", "Training", missing(advice, el("code", "distill-trainers train"), " writes; in Python "
                                                     "it is trainer.save_state()."))  # fmt: skip
    names = [name for name in dict.fromkeys(n for run in logged for n in run.logged()) if name not in _SILENT]
    names = [name for name in names if not name.endswith(BOOKKEEPING) and not name.startswith("train_")]
    names = [name for name in names if _without_teacher(name) is None or _without_teacher(name) not in names]
    names = [name for name in names if f"eval_{name.removeprefix(_GAP)}" not in names or not name.startswith(_GAP)]
    names, same = _each_once(names, logged)
    evaluated = [name for name in names if name.startswith("eval_")]
    progress = [name for name in names if name in _PROGRESS]
    terms = [name for name in names if name not in evaluated and name not in progress]
    groups = (
        ("Loss and its terms", sorted(terms, key=lambda name: name != "loss")),
        ("Held-out data", sorted(evaluated, key=_place)),
        ("Progress", progress),
    )
    parts: list[Any] = [legend([(run.name, i) for i, run in enumerate(logged)])]
    for title, chosen in groups:
        drawn = [_chart(name, logged, same[name]) for name in chosen]
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


def _place(name: str) -> int:
    """Where a score stands among those of the result."""
    stem = name.removeprefix("eval_").partition("/")[0]
    return FIRST.index(stem) if stem in FIRST else len(FIRST)


def _each_once(names: Sequence[str], runs: Sequence[Run]) -> tuple[list[str], dict[str, list[str]]]:
    """Leave out names whose curves are those of another one, and tell by the other's name which they are.

    A forward KL in training is also the loss, and its divergence: that would be the same chart three times.
    """
    kept: list[str] = []
    same: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (name == "eval_loss", name.endswith("divergence"))):
        twin = next((other for other in kept if _are_alike(name, other, runs)), None)
        if twin is None:
            kept.append(name)
        same.setdefault(twin or name, []).extend([name] if twin else [])
    return [name for name in names if name in kept], same


def _are_alike(one: str, other: str, runs: Sequence[Run]) -> bool:
    """Whether the drawings of two names would be the same: of no run do they part by more than 1 % of the range."""
    if one.startswith("eval_") != other.startswith("eval_") or _unit(one) != _unit(other):
        return False
    curves = [(run.curve(one), run.curve(other)) for run in runs]
    values = [value for curve, _ in curves for _, value in curve]
    if not values or any([x for x, _ in a] != [x for x, _ in b] for a, b in curves):
        return False
    near = _ALIKE * (max(values) - min(values)) + 1e-9
    return all(abs(y - v) <= near for a, b in curves for (_, y), (_, v) in zip(a, b, strict=True))


def _is_broken(value: Any) -> bool:
    return isinstance(value, float) and (value != value or value in (float("inf"), float("-inf")))


def _chart(name: str, runs: Sequence[Run], same: Sequence[str]) -> Html | None:
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
        note=join([el("code", name), _gap(name, runs), _twins(same)]),
        numbers=_numbers(f"{title} (%)" if unit == "%" else title, series),
    )


def _twins(same: Sequence[str]) -> Html | None:
    return join(["the same to the eye: ", *(el("code", name) for name in same)]) if same else None


def _gap(name: str, runs: Sequence[Run]) -> Html | None:
    """How much of the gap was closed at the end, where the log has it: the score's own curve has its course."""
    ends = [(run, run.curve(_GAP + name.removeprefix("eval_"))) for run in runs]
    told = [(f"{run.name}: " if len(runs) > 1 else "") + f"{100 * curve[-1][1]:.0f} %" for run, curve in ends if curve]
    return el("span", f"Gap closed at the end: {', '.join(told)}") if told and name.startswith("eval_") else None


def _without_teacher(name: str) -> str | None:
    """The student's score to which that of the teacher belongs."""
    return "eval_" + name.removeprefix(_TEACHER) if name.startswith(_TEACHER) else None


def _unit(name: str) -> str:
    stem = name.removeprefix("eval_").partition("/")[0]
    unit = MEASURES[stem].unit if stem in MEASURES else ""
    ends = ("top1_agreement", "acceptance", "accuracy", "padding_share")
    shares = stem.startswith(("gap_closed_", "pass@")) or stem.endswith(ends)
    if unit == "share" or shares:
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
