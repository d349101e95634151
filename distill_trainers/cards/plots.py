"""The plot on a model card."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..storage import write_file

# Left, bottom, width, height: to fit them to the labels, a figure would be drawn twice.
_AXES = (0.16, 0.13, 0.72, 0.79)


def plot_history(history: Sequence[dict[str, Any]], folder: str | Path) -> list[Path]:
    """Plot training loss, and held-out KL with top-1 agreement, from a trainer's `state.log_history`.

    Returns:
        the files written; none if matplotlib (the extra `plots`) is missing.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot, which would change the backend of a notebook
    except ImportError:
        return []
    folder = Path(folder)
    train = [(log["step"], log["loss"]) for log in history if "loss" in log]
    evals = {log["step"]: log for log in history if "eval_kl" in log}
    written = []

    figure = Figure(figsize=(6, 4))
    axis = figure.add_axes(_AXES)
    axis.plot(*zip(*train, strict=True) if train else ([], []), marker="o", markersize=3)
    axis.set(xlabel="optimiser step", ylabel="loss (nats per trained token)", title="Training loss")
    axis.grid(alpha=0.3)
    written.append(save_figure(figure, folder / "loss.png", dpi=150))
    if not evals:
        return written

    figure = Figure(figsize=(6, 4))
    axis = figure.add_axes(_AXES)
    steps = sorted(evals)
    axis.plot(steps, [evals[s]["eval_kl"] for s in steps], marker="o", color="tab:blue")
    axis.set(xlabel="optimiser step", ylabel="forward KL to the teacher (nats/token)", title="Held-out agreement")
    axis.set_ylim(0, 1.05 * max(evals[s]["eval_kl"] for s in steps) or 1.0)
    axis.grid(alpha=0.3)
    right = axis.twinx()
    right.plot(steps, [100 * evals[s]["eval_top1_agreement"] for s in steps], marker="s", color="tab:orange")
    right.set_ylabel("top-1 agreement (%)", color="tab:orange")
    right.set_ylim(0, 100)
    axis.yaxis.label.set_color("tab:blue")
    written.append(save_figure(figure, folder / "agreement.png", dpi=150))
    return written


def save_figure(figure: Any, file: Path, **options: Any) -> Path:
    """Write a plot in the format that its suffix names.

    Raises:
        CheckpointError: it cannot be written.
    """
    image = io.BytesIO()
    figure.savefig(image, format=file.suffix.removeprefix("."), **options)
    return write_file(file, image.getvalue(), "the plot", "Free some space; what it shows is kept.")
