"""The data as a run reads them: the first row with its trained tokens marked, and what is wrong with single rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from ..data.arrow import without_filling
from ..data.formats import detect_dataset_type
from ..data.labels import IGNORED
from ..data.pairs import is_pair, split_pair
from ..data.rows import tokenize_row
from ..exceptions import DatasetError

_SHOWN = 5  # kinds of faults
_CHARACTERS = 400  # of a stretch of the first row


def marked(row: Mapping[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the text of a tokenised row in stretches, each with whether it is trained."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    runs = groupby(pairs, lambda pair: pair[1] != IGNORED)
    return [(str(tokenizer.decode([token for token, _ in run])), trained) for trained, run in runs]


def shortened(text: str) -> str:
    """Return a long stretch without its middle, which is counted."""
    left_out = len(text) - _CHARACTERS
    if left_out <= 0:
        return text
    half = _CHARACTERS // 2
    return f"{text[:half]} [… {left_out:,} characters …] {text[-half:]}"


def faults(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, args: Any, features: Any = None
) -> Iterator[DatasetError]:
    """Yield what a run would refuse of single rows, in its words: the first of each kind."""
    told: set[str] = set()
    for number, row in enumerate(rows):
        try:
            for asked in _asked(row, features):
                tokenize_row(
                    asked,
                    tokenizer,
                    dataset_type=detect_dataset_type(asked),
                    assistant_only_loss=args.assistant_only_loss,
                    chat_template_kwargs=args.chat_template_kwargs,
                    features=features,
                )
        except DatasetError as error:
            # Numbers and quoted texts differ from row to row.
            kind = re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "", str(error))
            if kind not in told:
                told.add(kind)
                yield DatasetError(f"Row {number} of dataset 'train': {error}")
        if len(told) == _SHOWN:
            return


def _asked(row: Mapping[str, Any], features: Any) -> Iterable[Mapping[str, Any]]:
    """The rows that are tokenised of one row: both sides of a pair."""
    if not is_pair(row):
        return [row]
    prompt, *sides = split_pair(without_filling(row, features))
    return [{**row, "prompt": prompt, "completion": side} for side in sides]
