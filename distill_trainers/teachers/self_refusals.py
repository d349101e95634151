"""What a student cannot be as its own teacher, from settings alone, and what it is warned of."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from .. import models
from ..exceptions import ConfigurationError
from ..requirements import Requirements
from .base import Pair, named
from .local import LocalTeacher, trained_outside_adapters
from .placement import PLACEMENTS

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .options import TeacherOptions

_THINKS = ("enable_thinking", "<think>")  # in chat templates


def said(options: TeacherOptions) -> str:
    kind = options.self_teacher
    return f"`self_teacher: {kind}`" if kind else "`teacher_placement: adapter_off`"


def refuse_body(pair: Pair, options: TeacherOptions, allowed: tuple[str, ...] = ("auto",)) -> None:
    """Refuse a teacher beside the student, and settings of weights that it does not have."""
    refuse_teacher(pair, options)
    if options.teacher_placement not in allowed:
        raise ConfigurationError(
            f"Got {said(options)} with `teacher_placement: {options.teacher_placement}`; expected "
            f"{' or '.join(allowed)}: its weights are the student's. Leave the placement out."
        )
    if options.teacher_model_init_kwargs:
        raise ConfigurationError(
            f"Got {said(options)} with `teacher_model_init_kwargs`, where nothing is loaded for the teacher. Leave "
            "them out; `model_init_kwargs` are the student's."
        )


def refuse_teacher(pair: Pair, options: TeacherOptions) -> None:
    if pair.teacher is not None:
        raise ConfigurationError(
            f"Got {said(options)} and the teacher {named(pair.teacher)}; expected no teacher, since the student is "
            "its own. Leave one of them out."
        )


def refuse_uncopied(pair: Pair, options: TeacherOptions) -> None:
    """Refuse what a copy of a student without an adapter cannot be."""
    refuse_teacher(pair, options)
    refuse_renewed(pair)
    placement, given = options.teacher_placement, dict(options.teacher_model_init_kwargs or {})  # type: ignore[arg-type]
    if not PLACEMENTS[placement].has_body:
        raise ConfigurationError(
            f"Got {said(options)} with `teacher_placement: {placement}` and a student without an adapter; expected a "
            "place for a copy of it, such as `replicate` or `zero3`. Leave the placement out, or train an adapter "
            "(`use_peft: true`)."
        )
    if getattr(pair.student, "is_quantized", False) or "quantization_config" in (options.model_init_kwargs or {}):
        raise ConfigurationError(
            f"Got {said(options)} with a quantised student that has no adapter; expected one whose weights train, "
            "or an adapter on it. Set `use_peft: true` (`peft_config`), or load the student unquantised."
        )
    if isinstance(pair.student, str):
        LocalTeacher.refuse(dataclasses.replace(pair, teacher=pair.student), options, Requirements("", frozenset()))
        return
    if PLACEMENTS[placement].by_name or given.keys() - {"dtype"}:
        what = f"teacher_placement: {placement}" if PLACEMENTS[placement].by_name else "teacher_model_init_kwargs"
        raise ConfigurationError(
            f"Got {said(options)} with `{what}` and a {type(pair.student).__name__} in memory; expected a folder or "
            "Hub id as the student, since it acts while weights are loaded (a `dtype` alone is fine). Pass the student "
            "by name."
        )


def refuse_renewed(pair: Pair) -> None:
    if pair.renewed:
        raise ConfigurationError(
            "Got the student before training as a teacher, and `model_init`, which makes a student anew for each "
            "`train`, not the one to be copied now; expected one student. Pass it as `model`, train an adapter "
            "(`peft_config`), or name the teacher (`teacher_model`)."
        )


def refuse_moving_base(student: nn.Module) -> None:
    """Refuse the base below an adapter as a frozen teacher where training moves it."""
    moving = trained_outside_adapters(student) if models.is_peft(student) else []
    if moving:
        raise ConfigurationError(
            f"Got the student without its adapter as the teacher, and a student that trains {len(moving)} weights of "
            f"the base too ({', '.join(moving[:3])}), with which the teacher would move; expected an adapter alone. "
            "Set `bias: none` in the `peft_config`, or take `self_teacher: initial`, which keeps their first values."
        )


def refuse_mixture(said: str, wants: Requirements) -> None:
    if "completions" in wants.needs:
        raise ConfigurationError(
            f"Got {said} with `teacher_mix_alpha` above 0, which runs student and teacher in one decode loop, but they "
            "share their weights. Set `teacher_mix_alpha: 0`."
        )


def refuse_writing(options: TeacherOptions, wants: Requirements) -> None:
    """Refuse a moving teacher whose text would be kept."""
    refuse_mixture(said(options), wants)
    if wants.replaces_completions:
        raise ConfigurationError(f"Got completions to be written by the teacher. {writes_nothing(said(options))}")


def writes_nothing(said: str) -> str:
    return (
        f"With {said} the teacher moves with the student, and text of it would be out of date at the next step; "
        "expected completions in the dataset, the student's own (`lmbda: 1`), or `self_teacher: initial`."
    )


def warn_of_thinking(pair: Pair, options: TeacherOptions) -> None:
    template = getattr(pair.tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, Mapping) else [template]
    found = [word for word in _THINKS if any(word in str(text) for text in texts)]
    if found:
        logger.warning(
            "Got %s with a chat template that has `%s`: models that think have lost up to 17%% of their accuracy when "
            "they were their own teacher (arXiv 2607.05184), as their text became shorter and surer. Watch "
            "`completion_length` and `entropy`, and score held-out answers.",
            said(options),
            found[0],
        )
