"""What is warned of before training: a teacher that sees no more than the student, in all rows or in some."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ...data.formats import first_row
from ...data.teacher_prompts import CONTEXT

logger = logging.getLogger(__name__)


def warn_of_nothing_new(args: Any, rows: Any) -> None:
    """Warn where a self-teacher says what the student says: it has its weights at first, and reads the same.

    Only for a student without dropout, by which the two would differ.

    Args:
        args: a `DistillConfig`.
        rows: tokenised training rows, or None.
    """
    kind = args.self_teacher
    if kind is None or rows is None or "teacher_length" in (rows.column_names or first_row(rows)):  # it has its prompt
        return
    if kind != "live" and not args.follows_teacher_alone:  # it holds the student near what it was
        return
    stays = "stays 0" if kind == "live" else "stays 0 and training stands still"
    logger.warning(
        "Got `self_teacher: %s` with rows that student and teacher see alike, and without dropout: both say the same, "
        "so the loss of distillation %s. Let the teacher see more than the student (`teacher_system_prompt`, "
        "`teacher_prompt`, a column `privileged_context`), or add another term to the loss (`lm_loss_weight`).",
        kind,
        stays,
    )


def warn_of_plain_evaluation(train: Any, scored: Mapping[str, Any]) -> None:
    """Tell which evaluation rows have no context for their teacher, where training rows have one."""
    has_view, datasets = "view_start", {"train": train, **scored}
    seen = {name: set(getattr(dataset, "column_names", None) or [has_view]) for name, dataset in datasets.items()}
    plain = [name for name, columns in seen.items() if has_view not in columns]
    if plain and has_view in seen["train"]:
        logger.warning(
            "The teacher has a context of its own in the training rows, by the column %r, but none in %s, which has no "
            "such column: its KL is the distance to a teacher that reads what the student reads. Add the column, with "
            "null where a row has none, to measure what is trained.",
            CONTEXT,
            ", ".join(plain),
        )
