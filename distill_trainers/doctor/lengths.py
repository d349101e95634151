"""Do rows fit: into max_length, and max_length into what the models were made for?"""

from __future__ import annotations

from collections.abc import Iterator

from .. import models
from .case import Case
from .findings import Finding, error, warning

_CUT = 0.1  # share of rows that may lose their end unmentioned


def check_lengths(case: Case) -> Iterator[Finding]:
    """Check the context lengths of both models, and how much of the data is cut."""
    limit = case.args.max_length or max(case.lengths, default=0)  # null cuts nothing
    longest = min(limit, max(case.lengths, default=limit))
    reached = limit if case.samples else longest
    for role, shape in (("student", case.student_shape), ("teacher", case.teacher_shape)):
        if shape is None or shape.context is None or limit <= shape.context:
            continue
        tell = error if reached > shape.context else warning
        rows = (
            f"Rows may have {limit} tokens (`max_length`), the longest of {len(case.lengths)} looked at has {longest}"
        )
        absolute = shape.absolute_positions
        yield tell("lengths", *models.beyond_positions(rows, role, shape.context, absolute=absolute))
    cut = [length for length in case.lengths if length > limit]
    if len(cut) > _CUT * max(1, len(case.lengths)):
        yield warning(
            "lengths",
            f"{len(cut)} of {len(case.lengths)} rows looked at are longer than `max_length: {limit}` and lose their "
            f"end (the longest has {max(cut)} tokens).",
            f"Raise `max_length` (to {max(cut)} for all of them), or drop long rows from the data.",
        )
    new = case.args.max_new_tokens
    tight = [length for length in case.prompt_lengths if length + new > limit]
    if case.samples and len(tight) > _CUT * max(1, len(case.prompt_lengths)):
        yield warning(
            "lengths",
            f"{len(tight)} of {len(case.prompt_lengths)} prompts looked at leave less than `max_new_tokens: {new}` of "
            f"`max_length: {limit}` for a rollout, so it is shorter, or the prompt loses its beginning.",
            f"Raise `max_length` to {max(tight) + new}, or lower `max_new_tokens`.",
        )
