"""Token-level minimum edit distance, and the key steps that it shows (EDIT, arXiv 2405.19737, Sec. 3.3).

Two chains of thought for one question differ in few tokens where one is a slip of the other: those tokens are the key
reasoning steps. Shapes: n and m tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SAME, _REPLACE, _DELETE, _INSERT = range(4)


@dataclass(frozen=True)
class Edits:
    """A shortest way from one sequence to another. It is not unique; that of `edits` changes as late as it can.

    Attributes:
        replaced: pairs of places, in the first and in the second sequence.
        deleted: places in the first.
        inserted: places in the second.
    """

    replaced: list[tuple[int, int]]
    deleted: list[int]
    inserted: list[int]

    @property
    def distance(self) -> int:
        """Number of edits: the Levenshtein distance."""
        return len(self.replaced) + len(self.deleted) + len(self.inserted)


def edits(first: Sequence[int], second: Sequence[int]) -> Edits:
    """The edits that turn `first` `[n]` into `second` `[m]`; memory n · m · 4 bytes after common ends are taken off."""
    start, stop = _common_ends(first, second)
    a = np.asarray(first[start : len(first) - stop], dtype=np.int64)
    b = np.asarray(second[start : len(second) - stop], dtype=np.int64)
    table = _distances(a, b)
    replaced: list[tuple[int, int]] = []
    deleted: list[int] = []
    inserted: list[int] = []
    i, j = len(a), len(b)
    while i or j:
        step = _step_back(table, a, b, i, j)
        if step == _REPLACE:
            replaced.append((start + i - 1, start + j - 1))
        elif step == _DELETE:
            deleted.append(start + i - 1)
        elif step == _INSERT:
            inserted.append(start + j - 1)
        i -= step != _INSERT
        j -= step != _DELETE
    return Edits(replaced[::-1], deleted[::-1], inserted[::-1])


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """Levenshtein distance of two sequences of ids."""
    return edits(first, second).distance


def key_tokens(right: Sequence[int], wrong: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which tokens of a right and of a wrong chain are key steps.

    Returns:
        1 for every inserted or replaced token of the right chain `[n]`, and for every deleted or replaced token of the
        wrong one `[m]`, as edits turn the wrong chain into the right one; 0 elsewhere.
    """
    found = edits(wrong, right)
    on_right, on_wrong = [0] * len(right), [0] * len(wrong)
    for place in [*found.inserted, *(j for _, j in found.replaced)]:
        on_right[place] = 1
    for place in [*found.deleted, *(i for i, _ in found.replaced)]:
        on_wrong[place] = 1
    return on_right, on_wrong


def _common_ends(first: Sequence[int], second: Sequence[int]) -> tuple[int, int]:
    """How many tokens both share at the beginning, and then at the end."""
    shorter = min(len(first), len(second))
    start = next((k for k in range(shorter) if first[k] != second[k]), shorter)
    rest = shorter - start
    stop = next((k for k in range(rest) if first[-1 - k] != second[-1 - k]), rest)
    return start, stop


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`[n + 1, m + 1]` distances of all prefixes (Wagner & Fischer 1974), one row at a time.

    Within a row, an insertion depends on the entry to its left. With the column's number taken off, that chain is a
    running minimum.
    """
    columns = np.arange(len(b) + 1, dtype=np.int32)
    table = np.empty((len(a) + 1, len(b) + 1), dtype=np.int32)
    table[0] = columns
    for i, token in enumerate(a, start=1):
        row = table[i - 1] + 1
        row[1:] = np.minimum(row[1:], table[i - 1, :-1] + (b != token))
        table[i] = np.minimum.accumulate(row - columns) + columns
    return table


def _step_back(table: np.ndarray, a: np.ndarray, b: np.ndarray, i: int, j: int) -> int:
    here = table[i, j]
    if i and j:
        same = a[i - 1] == b[j - 1]
        if here == table[i - 1, j - 1] + (not same):
            return _SAME if same else _REPLACE
    return _DELETE if i and here == table[i - 1, j] + 1 else _INSERT
