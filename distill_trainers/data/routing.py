"""Which of several teachers a row belongs to: from a column of names to a number that travels with the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_trainers.exceptions import DatasetError
from distill_trainers.settings import shown

TEACHER_INDEX = "teacher_index"  # of rows and, `[B]`, of batches: a place among the names of the teachers


def teacher_index(row: Mapping[str, Any], names: Sequence[str], column: str) -> int:
    """Return the place of the row's teacher among `names`.

    Raises:
        DatasetError: the column is missing, or names none of them.
    """
    if column not in row:
        raise DatasetError(
            f"There is no column {column!r}, which says whose row it is; expected one with the names "
            f"{', '.join(names)}. Add it, rename yours (`column_mapping`), or set `teacher_column`."
        )
    name = row[column]
    if name not in names:
        raise DatasetError(
            f"The column {column!r} has {shown(name)!r} ({type(name).__name__}); expected the name of a teacher: "
            f"{', '.join(names)}. Mend the row, or add that teacher."
        )
    return list(names).index(name)
