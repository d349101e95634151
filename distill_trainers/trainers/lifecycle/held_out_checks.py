"""Which measures of held-out prompts a run can take, from its settings alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...evaluation import EvaluationSettings
from ...evaluation.measures import MEASURES, NEED_A_TEACHER
from ...exceptions import ConfigurationError, DatasetError
from ...requirements import Requirements
from ...teachers import Teacher

# What an evaluation tells without them.
ALWAYS_THERE = frozenset(
    {"perplexity", "kl", "top1_agreement", "acceptance", "accuracy", "answered", "tokens_per_answer"}
)


def check(
    args: Any,
    eval_dataset: Any,
    teachers: Sequence[type[Teacher] | Teacher],
    wants: Requirements,
    *,
    teacher_writes: bool,
) -> None:
    """Refuse measures that cannot be taken, before anything is loaded.

    Args:
        teachers: what each of several is going to be, or the only one.
        teacher_writes: whether completions can be had of them.

    Raises:
        ConfigurationError, DatasetError: which, and what they need.
    """
    names = args.eval_measures or []
    best = (args.metric_for_best_model or "").removeprefix("eval_").removeprefix("gap_closed_").removeprefix("teacher_")
    best = best.partition("/")[0]
    if best in MEASURES and best not in ALWAYS_THERE and MEASURES[best].metric not in names:
        raise ConfigurationError(
            f"Got `metric_for_best_model: {args.metric_for_best_model}`, which is measured only with "
            f"`eval_measures: [{MEASURES[best].metric}]`. Add it, or choose another metric."
        )
    if not names:
        return
    if eval_dataset is None:
        raise DatasetError(f"Got `eval_measures: {names}` but no `eval_dataset`, whose first rows they are taken on.")
    if args.max_new_tokens >= args.row_limit:
        raise ConfigurationError(
            f"Got `eval_measures` with max_new_tokens={args.max_new_tokens} and max_length={args.max_length}, which "
            "leaves no room for a prompt. Raise max_length, or lower max_new_tokens."
        )
    if "consistency" in names and args.eval_measures_seeds < 2:
        raise ConfigurationError(
            f"Got `eval_measures: {names}` with `eval_measures_seeds: {args.eval_measures_seeds}`; consistency "
            "compares the samples of at least 2 seeds."
        )
    if args.teacher_cache is not None and set(names) & NEED_A_TEACHER:
        raise ConfigurationError(
            f"Got `eval_measures: {names}` with a `teacher_cache`, which has no answers to text that a student is "
            f"going to write. Leave out {' and '.join(sorted(set(names) & NEED_A_TEACHER))}, or the cache."
        )
    if wants.encoder_decoder:
        raise ConfigurationError(
            "Got `eval_measures` for an encoder-decoder student; expected a causal LM. Leave them out: "
            "`eval_accuracy` scores such students."
        )
    lost = sorted(set(names) & NEED_A_TEACHER)
    if lost and args.has_own_tokenizer:
        raise ConfigurationError(
            f"Got `eval_measures: {names}` with `teacher_tokenizer: {args.teacher_tokenizer}`, of which "
            f"{' and '.join(lost)} compares both models id by id. Leave it out: the terms of `cross_tokenizer` are "
            "measured at each evaluation."
        )
    shown = [getattr(kind, "__name__", type(kind).__name__) for kind in teachers]
    blind = [name for name, kind in zip(shown, teachers, strict=True) if not kind.can_read_rollouts]
    of = "the teacher" if len(teachers) == 1 else "one of the teachers"
    if lost and blind:
        raise ConfigurationError(
            f"Got `eval_measures: {names}`, but {of} is a {blind[0]}, which cannot read a student's text. Leave out "
            f"{' and '.join(lost)}."
        )
    if "exposure_bias" in lost and not teacher_writes:
        mute = next((name for name, kind in zip(shown, teachers, strict=True) if not kind.can_generate), "")
        told = f"{of} is a {mute}, which writes" if mute else "a teacher is composed of several, which write"
        raise ConfigurationError(
            f"Got `eval_measures: {names}`, but {told} no text of its own. Leave out exposure_bias."
        )
    held_out_settings(args).check()


def held_out_settings(args: Any) -> EvaluationSettings:
    """Say how a run's measures are taken: sampled at temperature 1, whatever its rollouts are."""
    return EvaluationSettings(
        metrics=list(args.eval_measures),
        max_length=args.row_limit,
        max_new_tokens=args.max_new_tokens,
        seeds=[args.seed + k for k in range(args.eval_measures_seeds)],
        stop_strings=args.stop_strings,
        batch_size=args.rollout_batch_size or args.per_device_eval_batch_size,
        answer_formats=getattr(args, "answer_formats", None),
        answer_kind=getattr(args, "answer_kind", "auto"),
    )
