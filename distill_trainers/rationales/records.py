"""Rows on disk, appended as they are made and found again by key; what a teacher is asked, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..storage import Record


@dataclass(frozen=True)
class Request:
    """A prompt for a teacher: chat messages, and the number of the sample that is asked for."""

    key: str
    messages: list[dict[str, str]]
    sample: int = 0


@dataclass(frozen=True)
class Response:
    """What came back: a text, or an `error` in a few words.

    Attributes:
        finish: `stop` where the text ended by itself, `length` where it was cut off.
    """

    key: str
    text: str = ""
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    attempts: int = 1


class TextModel(Protocol):
    """A teacher that completes prompts: a local model, or an endpoint."""

    def identity(self) -> dict[str, Any]:
        """Tell all that its answers depend on beside the prompt; it goes into keys and provenance."""
        ...

    def complete(self, requests: Sequence[Request]) -> Iterator[Response]:
        """Yield answers in any order, each as soon as it is there; a failed request is an answer with an error."""
        ...


def dataset_of(rows: Sequence[Record]) -> Any:
    """Make a `datasets.Dataset` of rows with the columns of all; nested provenance becomes JSON text."""
    from datasets import Dataset

    names = list(dict.fromkeys(name for row in rows for name in row))
    return Dataset.from_list([{name: _plain(row.get(name)) for name in names} for row in rows])


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
