"""Token-level minimum edit distance, and the key steps that it shows (EDIT, arXiv 2405.19737, Sec. 3.3).

Two chains of thought for one question differ in few tokens where one is a slip of the other: those tokens are the key
reasoning steps. Shapes: n and m tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein


@dataclass(frozen=True)
class Edits:
    """A shortest way from one sequence to another. It is not unique; `edits` gives one of them.

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
    """Return the edits that turn `first` `[n]` into `second` `[m]`, in order; memory n · m / 4 bytes."""
    # Read from the end: of equally short ways, that one agrees most often with the way of the first release.
    steps = Levenshtein.editops(first[::-1], second[::-1])
    places = [(s.tag, len(first) - 1 - s.src_pos, len(second) - 1 - s.dest_pos) for s in reversed(list(steps))]
    return Edits(
        [(i, j) for tag, i, j in places if tag == "replace"],
        [i for tag, i, _ in places if tag == "delete"],
        [j for tag, _, j in places if tag == "insert"],
    )


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the Levenshtein distance of two sequences of ids."""
    return Levenshtein.distance(first, second)


def key_tokens(right: Sequence[int], wrong: Sequence[int]) -> tuple[list[int], list[int]]:
    """Tell which tokens of a right and of a wrong chain are key steps.

    Returns:
        1 for every inserted or replaced token of the right chain `[n]`, and for every deleted or replaced token of the
        wrong one `[m]`, as edits turn the wrong chain into the right one; 0 elsewhere.
    """
    changes = edits(wrong, right)
    on_right, on_wrong = [0] * len(right), [0] * len(wrong)
    for place in [*changes.inserted, *(j for _, j in changes.replaced)]:
        on_right[place] = 1
    for place in [*changes.deleted, *(i for i, _ in changes.replaced)]:
        on_wrong[place] = 1
    return on_right, on_wrong
