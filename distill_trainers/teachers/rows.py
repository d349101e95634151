"""A batch and a dataset row as a teacher meets them: without padding, known by their content."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..data.labels import IGNORED
from ..data.pairs import rows_of_pair
from ..data.rationales import rows_of_rationales

TokenRow = tuple[
    np.ndarray, np.ndarray
]  # ids `[T]` without padding, and the rising positions that predict a trained token


def row_key(input_ids: Sequence[int] | np.ndarray, predicts: Sequence[int] | np.ndarray) -> bytes:
    """Identify a row by its unpadded `input_ids` `[T]` and the positions that predict a trained token, rising."""
    ids, positions = (np.ascontiguousarray(values, dtype="<i8") for values in (input_ids, predicts))
    content = ids.tobytes() + positions.tobytes() + len(ids).to_bytes(8, "little")
    return hashlib.blake2b(content, digest_size=16).digest()


def unpadded_rows(inputs: Mapping[str, Tensor], predicts: Tensor) -> list[TokenRow]:
    """Cut a padded batch into rows: ids `[T]` and the positions that predict a trained token."""
    ids, mask, trained = (t.cpu().numpy() for t in (inputs["input_ids"], inputs["attention_mask"].bool(), predicts))
    return [(row[real], (real.cumsum() - 1)[:-1][where]) for row, real, where in zip(ids, mask, trained, strict=True)]


def batch_keys(inputs: Mapping[str, Tensor], predicts: Tensor) -> list[bytes | None]:
    """Return the key of each row of a padded batch; None for rows without trained tokens."""
    return [row_key(*row) if len(row[1]) else None for row in unpadded_rows(inputs, predicts)]


def dataset_row_key(row: Mapping[str, Any]) -> tuple[bytes, int]:
    """Return the key of a tokenised row, and its number of trained tokens."""
    positions = np.flatnonzero(np.asarray(row["labels"])[1:] != IGNORED)
    return row_key(row["input_ids"], positions), len(positions)


def examples_of(dataset: Any) -> Iterator[list[dict[str, Any]]]:
    """Iterate over the rows of each example: one, the two of a pair, or the two tasks of a rationale."""
    if "rejected_ids" in dataset.column_names:
        return map(rows_of_pair, dataset)
    if "other_input_ids" in dataset.column_names:
        return map(rows_of_rationales, dataset)
    return ([row] for row in dataset.select_columns(["input_ids", "labels"]))


def dataset_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Iterate over all rows of a tokenised dataset."""
    return itertools.chain.from_iterable(examples_of(dataset))
