"""Labels of a row: its ids where they are trained, -100 elsewhere; unshifted, as transformers and TRL have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

IGNORED = -100

TokenizedRow = dict[str, Any]


def labels_of(ids: Sequence[int], trained: Iterable[int]) -> list[int]:
    """Return the labels `[T]` of `ids`, trained where `trained` is true."""
    return [token if on else IGNORED for token, on in zip(ids, trained, strict=True)]


def completion_labels(prompt: Sequence[int], completion: Sequence[int]) -> list[int]:
    """Return the labels of a row of which the whole completion is trained, and nothing of the prompt."""
    return [IGNORED] * len(prompt) + list(completion)


def row_of(prompt: Sequence[int], completion: Sequence[int]) -> TokenizedRow:
    """Return the tokenised row of a prompt and its completion."""
    ids = [*prompt, *completion]
    return {"input_ids": ids, "labels": completion_labels(prompt, completion), "prompt_length": len(prompt)}


def any_trained(labels: Iterable[int]) -> bool:
    """Tell whether any label is trained."""
    return any(label != IGNORED for label in labels)


def is_tokenised(columns: Iterable[str]) -> bool:
    """Tell whether these are the columns of rows that this package has tokenised, not of a user's own tokens."""
    return {"input_ids", "labels", "prompt_length", "length"} <= set(columns)
