"""Plots as files, for papers and model cards: curves of a run as PNG, those of a report as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cards.plots import save_figure

if TYPE_CHECKING:
    from ..evaluation.results import EvaluationResults, ModelResults
    from .runs import Run

_LINES, _MARKERS = ("-", "--", "-.", ":"), "osD^vPX*"


def plot_runs(runs: Sequence[Run], folder: str | Path) -> list[Path] | None:
    """Plot what a report shows of these runs, each as PNG and as SVG.

    Returns:
        the files written; None if matplotlib (the extra `plots`) is missing.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    # Text of data and models is no TeX, and SVG keeps it as text.
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "distill_trainers"}):
        return _plot_runs(runs, Path(folder))


def _plot_runs(runs: Sequence[Run], folder: Path) -> list[Path]:
    written: list[Path] = []
    for name, label in (
        ("loss", "loss (nats per trained token)"),
        ("eval_kl", "held-out forward KL (nats/token)"),
        ("eval_perplexity", "held-out perplexity"),
    ):
        lines = [(run.name, *zip(*run.curve(name), strict=True)) for run in runs if run.curve(name)]
        if lines:
            written += _lines(folder / name, lines, "optimiser step", label)
    for i, run in enumerate(runs, 1):
        if run.evaluation is not None:
            prefix = f"run{i}_" if len(runs) > 1 else ""
            written += _plot_evaluation(run.evaluation, folder, prefix)
    return written


def _plot_evaluation(results: EvaluationResults, folder: Path, prefix: str) -> list[Path]:
    written: list[Path] = []
    for text in ("reference", "student"):
        curves = [
            (model.name, range(1, len(curve.mean) + 1), curve.mean)
            for model in results.models
            for curve in model.positions
            if (curve.measure, curve.text) == ("kl", text)
        ]
        if curves:
            label = "forward KL (nats/token)"
            written += _lines(folder / f"{prefix}kl_by_position_{text}", curves, "token of the completion", label)
    bins = [(model.name, [b for b in model.calibration if b.tokens]) for model in results.models]
    calibrated = [(name, [b.confidence for b in full], [b.accuracy for b in full]) for name, full in bins if full]
    if calibrated:
        written += _lines(folder / f"{prefix}calibration", calibrated, "probability", "accuracy", diagonal=True)
    if any(model.lengths for model in results.models):
        written += _length_plot(folder / f"{prefix}lengths", results.models)
    gaps = _gaps(results)
    return written + (_gap_plot(folder / f"{prefix}gap_closed", gaps) if gaps else [])


def _gaps(results: EvaluationResults) -> list[tuple[str, str, float, float, float]]:
    """Measure, student, share of the gap and its interval, in per cent; only where the gap is more than noise."""
    gaps = []
    for name, info in results.measures.items():
        for model in results.of_role("student"):
            gap = model.scores[name].gap_closed if name in model.scores else None
            if gap is None or gap.value is None or gap.low is None or gap.high is None or not gap.decided:
                continue
            gaps.append((info.title, model.name, 100 * gap.value, 100 * gap.low, 100 * gap.high))
    return gaps


def _lines(file: Path, lines: Sequence[Any], x_label: str, y_label: str, *, diagonal: bool = False) -> list[Path]:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for i, (name, xs, ys) in enumerate(lines):
        look: dict[str, Any] = {
            "linestyle": _LINES[i % len(_LINES)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 4,
        }
        axis.plot(list(xs), list(ys), label=name, markevery=max(1, len(ys) // 8), **look)
    if diagonal:
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(frameon=False)
    return _saved(figure, file)


def _length_plot(file: Path, models: Sequence[ModelResults]) -> list[Path]:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for i, model in enumerate(models):
        if model.lengths and sum(model.lengths.counts):
            shares = [100 * count / sum(model.lengths.counts) for count in model.lengths.counts]
            axis.stairs(shares, model.lengths.edges, label=model.name, linestyle=_LINES[i % len(_LINES)], linewidth=1.5)
    axis.set(xlabel="tokens per completion", ylabel="share of completions (%)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return _saved(figure, file)


def _gap_plot(file: Path, gaps: Sequence[tuple[str, str, float, float, float]]) -> list[Path]:
    import matplotlib.pyplot as plt

    students = list(dict.fromkeys(student for _, student, *_ in gaps))
    titles = list(dict.fromkeys(title for title, *_ in gaps))
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.38 * len(titles)), layout="constrained")
    for i, student in enumerate(students):
        of_student = [(titles.index(title), *rest) for title, name, *rest in gaps if name == student]
        places = [place + 0.18 * (i - (len(students) - 1) / 2) for place, *_ in of_student]
        values = [value for _, value, *_ in of_student]
        errors = [[max(v - low, 0) for _, v, low, _ in of_student], [max(high - v, 0) for _, v, _, high in of_student]]
        axis.errorbar(
            values, places, xerr=errors, fmt=_MARKERS[i % len(_MARKERS)], markersize=4, capsize=2, label=student
        )
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.axvline(100, color="grey", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(titles)), titles)
    axis.invert_yaxis()
    axis.set(xlabel="gap to the teacher that was closed (%)")
    axis.grid(alpha=0.3, axis="x")
    if len(students) > 1:
        axis.legend(frameon=False)
    return _saved(figure, file)


def _saved(figure: Any, file: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    files = [file.with_name(f"{file.name}{suffix}") for suffix in (".png", ".svg")]
    for path in files:
        save_figure(figure, path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return files
