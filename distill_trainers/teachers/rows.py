"""A batch and a dataset row as a teacher meets them: without padding, known by their content."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..data.labels import IGNORED
from ..data.packing import is_packed_dataset, restarts, rows_of_packed, unpacked
from ..data.pairs import rows_of_pair
from ..data.rationales import rows_of_rationales
from ..data.routing import TEACHER_INDEX
from ..data.views import view_features, viewed_row
from ..exceptions import ConfigurationError

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


def plain_rows(inputs: Mapping[str, Tensor], predicts: Tensor, teacher: str) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return a batch as padded rows `[R, T']`, and what they predict, for teachers that know a row by its ids alone.

    Packed rows are cut apart; all that is predicted stays in order.

    Raises:
        ConfigurationError: the batch says more about its rows than their ids.
    """
    positions = inputs.get("position_ids")
    wrong = sorted(inputs.keys() - {"input_ids", "attention_mask", "position_ids", "labels"})
    if positions is not None:
        is_packed = "attention_mask" not in inputs
        begins = restarts(positions) if is_packed else torch.zeros_like(positions, dtype=torch.bool)
        begins[:, 0] = True
        real = torch.ones_like(begins) if is_packed else inputs["attention_mask"].bool()
        places = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        usual = places - torch.where(begins, places, 0).cummax(1).values
        wrong += ["position_ids"] if ((positions != usual) & real).any() else []
    if wrong:
        raise ConfigurationError(
            f"Got batches with {wrong}; expected ids, mask and positions that count from 0: the teacher {teacher!r} "
            "knows a row by its ids alone. Leave them out of the batches, or take a teacher in this process."
        )
    whole = {name: value for name, value in inputs.items() if name != "position_ids" or "attention_mask" not in inputs}
    cut = unpacked({**whole, "predicts": pad(predicts, (0, 1))})
    return cut, cut.pop("predicts")[:, :-1]


def batch_keys(inputs: Mapping[str, Tensor], predicts: Tensor) -> list[bytes | None]:
    """Return the key of each row of a padded batch; None for rows without trained tokens."""
    return [row_key(*row) if len(row[1]) else None for row in unpadded_rows(inputs, predicts)]


def dataset_row_key(row: Mapping[str, Any]) -> tuple[bytes, int]:
    """Return the key of a tokenised row, and its number of trained tokens."""
    positions = np.flatnonzero(np.asarray(row["labels"])[1:] != IGNORED)
    return row_key(row["input_ids"], positions), len(positions)


def examples_of(dataset: Any) -> Iterator[list[Mapping[str, Any]]]:
    """Iterate over each example's rows as the teacher reads them.

    They are one, the two of a pair, the two tasks of a rationale, or packed ones.
    """
    columns = ["input_ids", "labels"]
    columns += [name for name in (*view_features(own_tokenizer=True), TEACHER_INDEX) if name in dataset.column_names]
    examples: Iterator[list[dict[str, Any]]]
    if is_packed_dataset(dataset):
        examples = map(rows_of_packed, dataset)
    elif "rejected_ids" in dataset.column_names:
        examples = map(rows_of_pair, dataset)
    elif "other_input_ids" in dataset.column_names:
        examples = map(rows_of_rationales, dataset)
    else:
        examples = ([row] for row in dataset.select_columns(columns))
    return ([viewed_row(row) for row in rows] for rows in examples)


class DatasetRows:
    """All rows of a tokenised dataset, as the teacher reads them, each time that they are gone through."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return itertools.chain.from_iterable(examples_of(self.dataset))


def dataset_rows(dataset: Any) -> DatasetRows:
    """Return all rows of a tokenised dataset, to be gone through as often as one likes."""
    return DatasetRows(dataset)
