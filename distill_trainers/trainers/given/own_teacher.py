"""What a student that is its own teacher is warned of before it trains."""

from __future__ import annotations

import logging
from typing import Any

from ...data.formats import first_row

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
