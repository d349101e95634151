"""Results as tables of text, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..escaping import code, prose
from .results import FEWEST, EvaluationResults, GapClosed, Score

_BIG = 1000


@dataclass(frozen=True)
class TextTable:
    title: str
    headings: list[str]
    rows: list[list[str]]


def number(value: float | None, unit: str = "") -> str:
    """Write a score with the digits that tell something; shares as per cent."""
    if value is None:
        return "–"
    if unit == "share":
        return f"{100 * value:.1f} %"
    if abs(value) >= _BIG:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 or unit in ("F x 100", "BLEU", "%", "tokens") else f"{value:.3f}"


def with_interval(score: Score, unit: str = "") -> str:
    """Write `value [low, high]`."""
    shown = number(score.value, unit)
    if score.low is None or score.high is None:
        return shown
    low, high = (number(bound, unit).removesuffix(" %") for bound in (score.low, score.high))
    return f"{shown} [{low}, {high}]"


def share_of_gap(gap: GapClosed | None) -> str:
    """Write per cent of the gap with its interval; in brackets where it is noise, or of few prompts."""
    if gap is None or gap.value is None:
        return "–"
    value, low, high = (None if share is None else round(100 * share) for share in (gap.value, gap.low, gap.high))
    if not gap.decided:
        return f"({value} %)"
    return f"{value} %" if low is None or high is None else f"{value} % [{low}, {high}]"


def tables_of(results: EvaluationResults) -> list[TextTable]:
    """Make the tables: scores with intervals, the gap closed by each student, what the models cost."""
    confidence = results.settings.get("confidence", 0.95)
    names = [model.name for model in results.models]
    arrows = {True: " ↑", False: " ↓", None: ""}
    scores = []
    for name, info in results.measures.items():
        unit = f" ({info.unit})" if info.unit and info.unit != "share" else ""
        cells = [
            with_interval(Score(s.value, s.low, s.high), info.unit) if (s := model.scores.get(name)) else "–"
            for model in results.models
        ]
        scores.append([f"{info.title}{unit}{arrows[info.higher_is_better]}", *cells])
    rows = results.data.get("rows", 0)
    tables = [TextTable(f"Scores on {rows} rows, {100 * confidence:.0f} % intervals", ["", *names], scores)]
    students = results.of_role("student")
    gaps = [
        [info.title, *(share_of_gap(s.gap_closed if (s := model.scores.get(name)) else None) for model in students)]
        for name, info in results.measures.items()
        if any((s := model.scores.get(name)) and s.gap_closed is not None for model in students)
    ]
    if gaps:
        title = f"Gap to the teacher that was closed (in brackets: within noise, or of fewer than {FEWEST} prompts)"
        tables.append(TextTable(title, ["", *(model.name for model in students)], gaps))
    costs = [model for model in results.models if model.cost is not None]
    if costs:
        tables.append(_costs(costs))
    return tables


def _costs(models: list) -> TextTable:
    rows = [
        ["Parameters", *(f"{m.cost.parameters:,}" for m in models)],
        ["Weights (MiB)", *(f"{m.cost.weights_mib:,.1f}" for m in models)],
        ["Decoding (tokens/s)", *(f"{m.cost.tokens_per_second:,.1f}" for m in models)],
    ]
    if any(m.cost.speedup is not None for m in models):
        rows.append(
            ["Speed beside the teacher", *(f"{m.cost.speedup:.2f} x" if m.cost.speedup else "–" for m in models)]
        )
    if any(m.cost.peak_mib is not None for m in models):
        rows.append(["Peak device memory (MiB)", *(number(m.cost.peak_mib) for m in models)])
    cost = models[0].cost
    title = f"Cost: {cost.batch_size} prompts, {cost.new_tokens} tokens each, greedy, fastest pass, on {cost.device}"
    return TextTable(title, ["", *(m.name for m in models)], rows)


def markdown(results: EvaluationResults) -> str:
    """Write all tables, notes and samples as a Markdown document."""
    lines = ["# Evaluation", ""]
    sources = ", ".join(f"{prose(model.name)}: {code(model.source)}" for model in results.models)
    data = prose(results.data.get("name", ""))
    lines += [f"{sources}. Data: {data}, {results.data.get('rows', 0)} rows; forced text: "
              f"{results.data.get('reference_text', '')}. {results.created}", ""]  # fmt: skip
    for table in tables_of(results):
        lines += [
            f"## {table.title}",
            "",
            _row(map(prose, table.headings)),
            _row(["---"] + ["---:"] * (len(table.headings) - 1)),
        ]
        lines += [*(_row(row) for row in table.rows), ""]
    if results.notes:
        lines += ["## Notes", "", *(f"- {prose(note)}" for note in results.notes), ""]
    if results.samples:
        lines += ["## Samples", ""]
    for sample in results.samples:
        texts = {"prompt": sample.prompt, **sample.completions}
        lines += [f"- **{prose(name)}**: {prose(text)}" for name, text in texts.items()] + [""]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
