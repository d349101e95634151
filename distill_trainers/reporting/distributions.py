"""Where models part and how they write: by position, lengths, diversity, calibration, exposure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluation.measures import AGREEMENT, MEASURES
from ..evaluation.results import EvaluationResults, ModelResults, PositionCurve
from .charts import Series, histogram_chart, legend, line_chart, nice_ticks, short
from .markup import Html, el, figure, missing, section, table
from .runs import Run
from .score_tables import heading, in_order, style_of

TEXTS = {"reference": "reference text", "student": "the model's own text"}
_FEWEST = 3  # completions behind a mean by position
_SHOWN_NUMBERS = 40
_DIVERSITY = ("distinct_4", "self_bleu")


def distributions(runs: Sequence[Run]) -> Html | None:
    """Draw all of it for each run with an evaluation; None where there is none."""
    parts: list[Any] = []
    for run in runs:
        if len(runs) > 1 and run.evaluation is not None:
            parts.append(el("h3", run.name))
        if run.evaluation is not None:
            parts += _of_evaluation(run.evaluation, f"h{3 if len(runs) == 1 else 4}")
    return section("distributions", "Where they part, and how they write", parts) if parts else None


def _of_evaluation(results: EvaluationResults, tag: str) -> list[Any]:
    groups = (
        ("Divergence by position", [_positions(results, ("kl",)), _other_positions(results)], "agreement"),
        ("Tokens per completion", [_lengths(results)], "diversity"),
        ("Diversity by prompt", [_diversity(results, name) for name in _DIVERSITY], "diversity"),
        ("Calibration of next tokens", [_calibration(results)], "calibration"),
        ("Excess error by length", [_exposure(results)], "exposure_bias"),
    )
    signs = legend([(heading(model), style_of(results, model)) for model in in_order(results)])
    parts: list[Any] = [signs]
    for title, sets, metric in groups:
        parts.append(el(tag, title))
        if any(sets):
            # A measure's models side by side.
            parts += [d if isinstance(d, Html) else el("div", d, class_="charts") for d in sets if d]
        else:
            parts.append(
                missing(
                    "Not in this evaluation: it was made without ",
                    el("code", metric),
                    " in ",
                    el("code", "metrics"),
                    ", or what that needs (a teacher, prompts, completions) was not there.",
                )  # fmt: skip
            )
    return parts


def _other_positions(results: EvaluationResults) -> Html | None:
    """Fold what is not the forward KL."""
    drawn = _positions(results, [measure for measure in AGREEMENT if measure != "kl"])
    title = "Other measures by position"
    return el("details", el("summary", title), el("div", drawn, class_="charts")) if drawn else None


def _positions(results: EvaluationResults, measures: Sequence[str]) -> list[Html]:
    drawn = []
    for text, where in TEXTS.items():
        for measure in measures:
            curves = [
                (model, curve)
                for model in in_order(results)
                for curve in model.positions
                if (curve.text, curve.measure) == (text, measure) and curve.mean
            ]
            if curves:
                drawn.append(_position_chart(results, curves, f"{MEASURES[measure].title}, on {where}", measure))
    return drawn


def _position_chart(
    results: EvaluationResults, curves: list[tuple[ModelResults, PositionCurve]], title: str, measure: str
) -> Html:
    series = []
    share = MEASURES[measure].unit == "share"
    scale = 100 if share else 1
    for model, curve in curves:
        count = curve.count or [_FEWEST] * len(curve.mean)
        reached = sum(n >= min(_FEWEST, max(count)) for n in count)
        rows = list(zip(curve.mean, curve.low, curve.high, strict=False))[:reached]
        points = [(t + 1.0, scale * mean) for t, (mean, _, _) in enumerate(rows) if mean is not None]
        band = [
            (t + 1.0, scale * low, scale * high)
            for t, (_, low, high) in enumerate(rows)
            if low is not None and high is not None
        ]
        series.append(Series(heading(model), points, style_of(results, model), band))
    drawing = line_chart(
        series,
        title=title,
        x_label="token of the completion",
        y_label="%" if share else MEASURES[measure].unit,
        zero=not share,
    )
    note = f"Positions that {_FEWEST} completions or more have reached."
    numbers = _numbers(f"{title} (%)" if share else title, "token", series)
    return figure(title, drawing, note=note, numbers=numbers)


def _numbers(title: str, first: str, series: Sequence[Series]) -> Html:
    places = sorted({x for curve in series for x, _ in curve.points})
    every = -(-len(places) // _SHOWN_NUMBERS)
    columns = [dict(curve.points) for curve in series]
    rows = [[f"{x:g}", *(short(values.get(x)) for values in columns)] for x in places[::every]]
    caption = title if every == 1 else f"{title}, every {every} places"
    return table(caption, [first, *(curve.name for curve in series)], rows)


def _lengths(results: EvaluationResults) -> list[Html]:
    models = [model for model in in_order(results) if model.lengths and sum(model.lengths.counts)]
    most = max((100 * max(m.lengths.counts) / sum(m.lengths.counts) for m in models if m.lengths), default=None)
    return [
        _histogram(results, model, model.lengths.edges, model.lengths.counts, "tokens per completion", most)
        for model in models
        if model.lengths
    ]


def _histogram(
    results: EvaluationResults,
    model: ModelResults,
    edges: Sequence[float],
    counts: Sequence[int],
    x_label: str,
    most: float | None,
) -> Html:
    title = f"{heading(model)}: {x_label}"
    drawing = histogram_chart(edges, counts, title=title, x_label=x_label, style=style_of(results, model), most=most)
    rows = [[f"{short(a)} to {short(b)}", f"{n:,}"] for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    return figure(title, drawing, numbers=table(title, [x_label, "count"], rows))


def _diversity(results: EvaluationResults, name: str) -> list[Html]:
    """One measure of it, for each model on the same scales."""
    if name not in results.measures:
        return []
    info, scale = results.measures[name], 100 if results.measures[name].unit == "share" else 1
    values = {
        model.name: [scale * v for v in model.scores[name].per_prompt if v is not None]
        for model in in_order(results)
        if name in model.scores
    }
    everything = [v for column in values.values() for v in column]
    if not everything:
        return []
    edges = np.array(nice_ticks(min(everything), max(everything), wanted=12))
    counts = {model: np.histogram(column, edges)[0].tolist() for model, column in values.items() if column}
    most = max(100 * max(bars) / sum(bars) for bars in counts.values())
    label = f"{info.title} ({'%' if scale == 100 else info.unit})"
    return [_histogram(results, results.model(m), edges.tolist(), bars, label, most) for m, bars in counts.items()]


def _calibration(results: EvaluationResults) -> list[Html]:
    series, rows = [], []
    for model in in_order(results):
        bins = [
            entry
            for entry in model.calibration
            if entry.tokens and entry.confidence is not None and entry.accuracy is not None
        ]
        if bins:
            points = sorted((entry.confidence or 0.0, entry.accuracy or 0.0) for entry in bins)
            series.append(Series(heading(model), points, style_of(results, model)))
        rows += [
            [
                heading(model),
                f"{entry.low:.2g} to {entry.high:.2g}",
                f"{entry.tokens:,}",
                short(entry.confidence),
                short(entry.accuracy),
            ]
            for entry in bins
        ]
    if not series:
        return []
    title = "Accuracy of the likeliest token by its probability"
    drawing = line_chart(
        series, title=title, x_label="probability", y_label="accuracy", limits=((0, 1), (0, 1)), diagonal=True
    )
    heads = ["model", "bin", "tokens", "mean probability", "accuracy"]
    note = "On the dotted line, a model is as often right as it is sure; below it, it is too sure."
    return [figure(title, drawing, note=note, numbers=table(title, heads, rows))]


def _exposure(results: EvaluationResults) -> list[Html]:
    series = [
        Series(
            heading(model),
            [(i + 1.0, v) for i, v in enumerate(model.exposure) if v is not None],
            style_of(results, model),
        )
        for model in in_order(results)
        if any(v is not None for v in model.exposure)
    ]
    if not series:
        return []
    title = "Excess error from exposure bias, up to a length"
    drawing = line_chart(series, title=title, x_label="tokens of the completion", y_label="%", zero=True)
    return [figure(title, drawing, numbers=_numbers(title, "tokens", series))]
