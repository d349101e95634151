"""Rows that are longer than a model's positions: refused or told before any weights are loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from torch import nn

from ... import models
from ...exceptions import DatasetError
from ...requirements import Requirements
from ...teachers import loading
from ..config import DistillConfig

logger = logging.getLogger(__name__)


def check_positions(
    datasets: Mapping[str, Any],
    student: Any,
    student_config: Any,
    teacher: Any,
    args: DistillConfig,
    wants: Requirements,
) -> None:
    """Hold the longest row, with its rollout where there are any, against the positions of both models.

    Args:
        datasets: tokenised rows by name; None is left out.
        student, teacher: as they were given.

    Raises:
        DatasetError: a model that looks its positions up in a table has too few. Others warn.
    """
    given = {name: rows for name, rows in datasets.items() if rows is not None}
    own = {name: _reached(rows, name, args, wants) for name, rows in given.items()}
    views = {name: _reached_by_teacher(rows, name, args) or own[name] for name, rows in given.items()}
    roles = [("student", student, student_config)]
    for _, member in loading.each_teacher(teacher, args):
        source, options, frozen = member.given, member.options, loading.model_of(member.given)
        if frozen is not None and hasattr(frozen, "config"):
            roles.append(("teacher", frozen, frozen.config))
        elif isinstance(source, str) and loading.has_files(source, options):
            config = models.load_config(source, "teacher", **options.files_of("teacher"))
            overrides: Any = options.teacher_model_init_kwargs or {}
            roles.append(("teacher", source, models.with_overrides(config, overrides)))
    for role, source, config in roles:
        context = None if wants.encoder_decoder else models.positions_of(config)
        reached = own if role == "student" else views
        tokens, told, has_own_prompt = max(
            ((*reach, role == "teacher" and reach != own[name]) for name, reach in reached.items()),
            default=(0, "", False),
        )
        if context is None or tokens <= context:
            continue
        if not isinstance(source, nn.Module):
            source = models.without_weights(config, trust_remote_code=args.trust_remote_code)
        absolute = models.looks_positions_up(source)
        what, remedy = models.beyond_positions(told, role, context, absolute=absolute, has_own_prompt=has_own_prompt)
        if absolute:
            raise DatasetError(f"{what} {remedy}")
        if args.process_index == 0:
            logger.warning("%s %s", what, remedy)


def _reached(rows: Any, name: str, args: DistillConfig, wants: Requirements) -> tuple[int, str]:
    """How long rows of a dataset get, and that in words."""
    limit = args.max_length or math.inf
    if not isinstance(rows, Dataset):
        tokens = 0 if limit == math.inf else int(limit)
        return _padded(tokens, args), f"Rows of the stream {name!r} may have {tokens} tokens (`max_length`)"
    tokens, told = max(_lengths(rows), default=0), "tokens"
    sampled = name != "train" and bool(args.eval_measures)
    if "prompt_length" in rows.column_names and (sampled or args.answers_prompts(name, wants)):
        with_answer = int(min(limit, max(rows["prompt_length"][:], default=0) + args.max_new_tokens))
        if with_answer > tokens:
            tokens, told = with_answer, f"tokens with a sampled completion (max_new_tokens={args.max_new_tokens})"
    padded = _padded(tokens, args)
    told += f", {padded} when padded" if padded > tokens else ""
    return padded, f"The longest row of dataset {name!r} has {tokens} {told}"


def _reached_by_teacher(rows: Any, name: str, args: DistillConfig) -> tuple[int, str] | None:
    """How long rows get for a teacher with a view of its own, and that in words; None: as long as the student's."""
    if not isinstance(rows, Dataset):
        limit = args.teacher_max_length
        told = f"Rows of the stream {name!r} may have {limit} tokens for the teacher (`teacher_max_length`)"
        return None if limit is None else (limit, told)
    if "teacher_length" not in rows.column_names:
        return None
    tokens = max(rows["teacher_length"][:], default=0)
    return tokens, f"The longest row of dataset {name!r} has {tokens} tokens for the teacher, with its own prompt"


def _lengths(rows: Dataset) -> list[int]:
    if "seq_lengths" in rows.column_names:  # packed: positions start anew where a row begins
        return [max(lengths) for lengths in rows["seq_lengths"]]
    if "other_input_ids" not in rows.column_names:
        return rows["length"][:] if "length" in rows.column_names else []
    pairs = rows.select_columns(["input_ids", "other_input_ids"])  # two sequences, whose `length` is that of both
    return [len(ids) for row in pairs for ids in row.values()]


def _padded(tokens: int, args: DistillConfig) -> int:
    multiple = args.pad_to_multiple_of or 1
    return -(-tokens // multiple) * multiple
