"""Which scores an evaluation gives, and whether `metric_for_best_model` is one of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from ...evaluation.measures import MEASURES
from ...exceptions import ConfigurationError
from ..config import DistillConfig

_ALWAYS = {"loss", "perplexity", "tokens", "runtime", "samples_per_second", "steps_per_second"}
_OF_A_TEACHER = {"teacher_perplexity", "kl", "top1_agreement"}


def scores_of(args: DistillConfig) -> set[str] | None:
    """Name the scores of an evaluation, without `eval_` and its set's name; None where the method does not tell."""
    if args.loss_terms is None:
        return None
    return _ALWAYS | (_OF_A_TEACHER if args.needs else set()) | args.loss_terms | args.other_scores


def check_best_metric(args: DistillConfig, evaluation: Any, names: Collection[str] = ()) -> None:
    """Refuse a `metric_for_best_model` that no evaluation will give, instead of after the first one.

    Args:
        evaluation: a dataset, a dict of several, or None.
        names: of several teachers, each of which has scores of its own.

    Raises:
        ConfigurationError: naming the scores that there are.
    """
    metric, scores = args.metric_for_best_model, scores_of(args)
    if metric is None or scores is None or evaluation is None or args.eval_strategy == "no":
        return
    name = metric.removeprefix("eval_")
    several = list(evaluation) if isinstance(evaluation, dict) else None
    known = scores if several is None else {f"{part}_{score}" for part in several for score in scores}
    measured = {m.name for m in MEASURES.values() if m.metric in (args.eval_measures or [])}  # on one set, by no name
    measured |= {prefix + score for prefix in ("teacher_", "gap_closed_") for score in measured}
    score, _, teacher = name.rpartition("/")
    if teacher and names and score in known and teacher in names:
        return
    bare = name if several is None else next((name[len(p) + 1 :] for p in several if name.startswith(f"{p}_")), "")
    if name in known | measured or ("accuracy" in scores and bare.startswith("accuracy_")):
        return
    if several is not None and name in scores:
        near = [f"{part}_{name}" for part in several]
    else:
        near = difflib.get_close_matches(name, known | measured, n=3) or sorted(known | measured)
    sets = "" if several is None else f" with the evaluation sets {', '.join(several)}"
    raise ConfigurationError(
        f"Got `metric_for_best_model: {metric}`{sets}; expected a score that evaluation gives, such as "
        f"{', '.join(f'eval_{score}' for score in near)}."
    )
