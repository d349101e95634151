"""Batches of at most so many tokens, padding counted, of rows of about one length.

Rows are sorted by length and cut into buckets. All batches of a bucket have the same number of rows, or one less, and
each epoch deals the bucket's rows to them anew. So every row is in one batch, no batch has more tokens than allowed,
and the number of batches is known before: it is the same in every epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SPREAD = 0.1  # a bucket of several batches has no row that is shorter than its longest by a larger share


class TokenBatches:
    """The batches of an epoch, all optimiser steps of which have equally many, where there are rows for that.

    Args:
        lengths: tokens that each row takes in a batch.
        budget: the most tokens of a batch: its rows times the longest of them.
        processes: they get their batches in turn. Those of one turn have nearly the same lengths.
        accumulated: turns of an optimiser step. Each comes from another stretch of lengths, so that steps are alike.

    Raises:
        ValueError: there is no row, or one that is longer than the budget.
    """

    def __init__(self, lengths: Sequence[int], budget: int, processes: int = 1, accumulated: int = 1):
        if not len(lengths) or max(lengths) > budget:
            raise ValueError(f"Got {len(lengths)} rows for batches of {budget} tokens; expected some, none longer.")
        self.processes, self.accumulated = processes, accumulated
        negative = -np.asarray(lengths)
        order = np.argsort(negative, kind="stable")  # the longest first
        negative = negative[order]
        fewest = _count(_buckets(negative, budget))
        units = (processes * accumulated, processes, 1)  # with fewer rows than processes, accelerate repeats some
        self._count = next(total for unit in units if (total := -(-fewest // unit) * unit) <= len(order) or unit == 1)
        least = -int(negative[0])
        while least < budget:  # the smallest batches that are not too many: all of them shrink, in place of a few
            middle = (least + budget) // 2
            if _count(_buckets(negative, middle)) <= self._count:
                budget = middle
            else:
                least = middle + 1
        filled = _filled(_buckets(negative, budget), negative, self._count)
        self._buckets = [(order[start:end], count) for start, end, count in filled]

    def __len__(self) -> int:
        return self._count

    def drawn(self, generator: np.random.Generator) -> list[list[int]]:
        """Return the batches of one epoch, as numbers of rows, in their order."""
        batches = [
            part.tolist()
            for rows, count in self._buckets
            for part in np.array_split(generator.permutation(rows), count)
        ]
        turns = len(batches) // self.processes
        if turns % self.accumulated == 0:
            stretches = np.arange(turns).reshape(self.accumulated, -1)
            order = generator.permuted(stretches, axis=1).T.ravel().tolist()
        else:
            order = generator.permutation(turns).tolist()
        dealt = [batch for turn in order for batch in batches[turn * self.processes : (turn + 1) * self.processes]]
        return dealt + batches[turns * self.processes :]


Bucket = tuple[int, int, int]  # its rows, from the first to before the last, and the number of its batches


def _buckets(negative: np.ndarray, budget: int) -> list[Bucket]:
    """Cut sorted rows, given their negative lengths: of as many batches as rows near the longest fill, or of one."""
    buckets, start, total = [], 0, len(negative)
    while start < total:
        longest = -int(negative[start])
        rows = budget // max(1, longest)
        near = int(np.searchsorted(negative, (_SPREAD - 1) * longest, side="right")) - start
        whole = start + max(1, near // rows) * rows
        end = total if start + near == total else min(total, whole)  # the very last rows are shared out evenly
        buckets.append((start, end, -(-(end - start) // rows)))
        start = end
    return buckets


def _count(buckets: Sequence[Bucket]) -> int:
    return sum(count for *_, count in buckets)


def _filled(buckets: Sequence[Bucket], negative: np.ndarray, total: int) -> list[Bucket]:
    """The same with `total` batches in all: one by one, the bucket with the largest batches gets another."""
    counts = [count for *_, count in buckets]
    for _ in range(total - sum(counts)):
        sizes = [
            -(-(end - start) // count) * -int(negative[start]) if end - start > count else -1
            for (start, end, _), count in zip(buckets, counts, strict=True)
        ]
        counts[sizes.index(max(sizes))] += 1
    return [(start, end, count) for (start, end, _), count in zip(buckets, counts, strict=True)]
