"""Which scores an evaluation gives, and whether `metric_for_best_model` is one of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Any

from ...data.routing import TEACHER_INDEX
from ...evaluation.measures import MEASURES
from ...exceptions import ConfigurationError
from ..config import DistillConfig

_ALWAYS = {"loss", "perplexity", "tokens", "runtime", "samples_per_second", "steps_per_second"}
_OF_THE_WHOLE = {"runtime", "samples_per_second", "steps_per_second"}
_OF_DISTRIBUTIONS = {"kl", "top1_agreement", "acceptance"}
_SPARSE = {"topk", "sampled"}


def scores_of(args: DistillConfig) -> set[str] | None:
    """Name the scores of an evaluation, without `eval_` and its set's name; None where the method does not tell."""
    if args.loss_terms is None:
        return None
    bytewise = {"bits_per_byte"} if args.scores_all_text else set()
    return _ALWAYS | bytewise | _of_a_teacher(args) | args.loss_terms | args.other_scores


def _of_a_teacher(args: DistillConfig) -> set[str]:
    if not args.needs:
        return set()
    kinds = {args.teacher_server_kind, args.teacher_cache_kind if args.teacher_cache else ""}
    if args.has_own_tokenizer or "token_logprobs" in kinds:  # of the given tokens alone
        return {"teacher_perplexity"}
    unknown = {"acceptance"} if args.temperature != 1 and kinds & _SPARSE else set()
    return ({"teacher_perplexity"} | _OF_DISTRIBUTIONS) - unknown


def scores_of_each(args: DistillConfig) -> set[str]:
    """Name the scores that each of several teachers has of its own rows, as `SCORE/NAME`."""
    return (scores_of(args) or set()) - _OF_THE_WHOLE - args.other_scores


def measured_scores(args: DistillConfig) -> set[str]:
    """Name the scores of `eval_measures`, without `eval_`: on one set, whose name is no part of them."""
    measured = {m.name for m in MEASURES.values() if m.metric in (args.eval_measures or [])}
    return measured | {prefix + score for prefix in ("teacher_", "gap_closed_") for score in measured}


def check_best_teacher(args: DistillConfig, evaluation: Any, names: Sequence[str]) -> None:
    """Refuse a `metric_for_best_model` of a teacher that has no row in the evaluation set.

    Args:
        evaluation: tokenised rows, or a dict of several sets of them; streams are not looked at.
        names: of several teachers.

    Raises:
        ConfigurationError: naming the teachers that have rows.
    """
    score, _, teacher = (args.metric_for_best_model or "").removeprefix("eval_").rpartition("/")
    if teacher not in names or args.eval_strategy == "no":
        return
    given, own = {"": evaluation}, scores_of_each(args)
    if isinstance(evaluation, dict):
        given = {f"{part}_": rows for part, rows in evaluation.items()}
    for prefix, rows in given.items():
        is_meant = score.startswith(prefix) and score[len(prefix) :] in own
        if not is_meant or TEACHER_INDEX not in (getattr(rows, "column_names", None) or ()):
            continue
        found = [names[k] for k in sorted(set(rows[TEACHER_INDEX]))] if hasattr(rows, "__len__") else names
        if teacher not in found:
            raise ConfigurationError(
                f"Got `metric_for_best_model: {args.metric_for_best_model}`, but no row of the evaluation set belongs "
                f"to {teacher!r}; expected a teacher that has rows there: {', '.join(found)}. Add rows of it, or take "
                "another score."
            )


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
    own = scores_of_each(args)
    own = own if several is None else {f"{part}_{score}" for part in several for score in own}
    measured = measured_scores(args)
    score, _, teacher = name.rpartition("/")
    if score in own | measured and teacher in names:
        return
    bare = name if several is None else next((name[len(p) + 1 :] for p in several if name.startswith(f"{p}_")), "")
    if name in known | measured or ("accuracy" in scores and bare.startswith("accuracy_")):
        return
    if several is not None and name in scores:
        near = [f"{part}_{name}" for part in several]
    elif score in own and names:
        near = [f"{score}/{teacher}" for teacher in names]
    else:
        given = known | measured | {f"{score}/{teacher}" for score in own for teacher in names}
        near = difflib.get_close_matches(name, given, n=3) or sorted(given)
    sets = "" if several is None else f" with the evaluation sets {', '.join(several)}"
    raise ConfigurationError(
        f"Got `metric_for_best_model: {metric}`{sets}; expected a score that evaluation gives, such as "
        f"{', '.join(f'eval_{score}' for score in near)}."
    )
