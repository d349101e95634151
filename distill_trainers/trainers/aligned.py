"""The loss against a teacher with a tokenizer of its own, as a run's settings and its tokenizers have it."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..data.alignment import shared_ids
from ..data.other_tokenizer import OtherTokenizer
from ..exceptions import ConfigurationError
from ..losses.aligned import DEFAULT_TERMS, TERMS, AlignedLoss
from ..losses.cross_tokenizer import common_buckets
from ..requirements import Requirements
from ..settings import require, shown
from ..teachers.base import Teacher
from ..teachers.several import Several
from ..value_types import parse_mapping


def check_terms(args: Any) -> None:
    """Refuse terms of a config that are none, and settings of a teacher with a tokenizer of its own without one."""
    if isinstance(args.cross_tokenizer, str):
        args.cross_tokenizer = parse_mapping(args.cross_tokenizer)
    terms, own = args.cross_tokenizer, args.has_own_tokenizer
    beside = "`teacher_tokenizer: own` beside it, for a teacher with another tokenizer than the student's"
    require(own or terms is None, "cross_tokenizer", terms, beside)
    require(own or args.alm_temperature is None, "alm_temperature", args.alm_temperature, beside)
    fits = terms is None or (bool(terms) and terms.keys() <= set(TERMS) and all(map(_is_weight, terms.values())))
    require(fits, "cross_tokenizer", terms, f"weights above 0 of any of {', '.join(TERMS)}, such as {DEFAULT_TERMS}")
    reads = "none, where likelihoods of whole texts are all that is compared"
    require(terms is None or args.compares_chunks, "cross_tokenizer", terms, reads)
    tau, names = args.alm_temperature, (args.aligned_terms if args.compares_chunks else {})
    require(tau is None or "alm" in names, "alm_temperature", tau, "none without the term alm of `cross_tokenizer`")
    softened = "1: likelihoods of text, which are all that is compared, have no temperature but `alm_temperature`"
    softens = args.kd_temperature == 1 or bool(names.keys() - {"alm"})
    require(not own or softens, "kd_temperature", args.kd_temperature, softened)
    packed = "false with `teacher_tokenizer`: packed rows have no prompt for the teacher"
    require(not (own and args.packing), "packing", args.packing, packed)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def refuse_own_tokenizer(args: Any, kind: type[Teacher], wants: Requirements) -> None:
    """Refuse a teacher with a tokenizer of its own where nothing could be made of what it says.

    Args:
        kind: of the teacher.
    """
    if not args.has_own_tokenizer:
        return
    setting = f"`teacher_tokenizer: {shown(args.teacher_tokenizer)}`"
    why, remedy = args.why_shared_tokenizer, "Leave that out"
    if kind.is_nobody:
        why, remedy = "there is no teacher", "Name one"
    elif issubclass(kind, Several):
        why, remedy = (
            "the answers of several teachers are joined id by id",
            "Name one teacher, or one run after another",
        )
    elif kind.is_the_student:
        why, remedy = "the student is its own teacher and reads its own ids", "Leave the setting out"
    if why:
        raise ConfigurationError(
            f"Got {setting} with {wants.trainer}, where {why}; expected a teacher that shares the student's tokenizer "
            f"there. {remedy}, or set `teacher_tokenizer: shared`."
        )
    if args.teacher_max_length is not None and wants.samples_completions:
        raise ConfigurationError(
            f"Got `teacher_max_length: {args.teacher_max_length}` with {setting} and completions of the student's, "
            "of which the number of the teacher's tokens is known once they are written; expected none. Leave it out: "
            "`max_new_tokens` bounds them."
        )


def aligned_loss(args: Any, other: OtherTokenizer) -> AlignedLoss:
    """Build the loss of a config with `aligned_terms`."""
    weights, student, teacher = args.aligned_terms, other.student.tokens, other.teacher.tokens
    nothing = torch.zeros(0, dtype=torch.int64)
    return AlignedLoss(
        weights,
        args.kd_temperature,
        *common_buckets(student.first_bytes(), teacher.first_bytes()),
        *(shared_ids(student, teacher) if "exact_overlap" in weights else (nothing, nothing)),
    )
