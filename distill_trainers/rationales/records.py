"""Rows on disk, appended as they are made and found again by key; what a teacher is asked, and what it answers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..exceptions import DatasetError, writing

Row = dict[str, Any]

_REMEDY = "What was written earlier is kept: free some space and start again."


def content_key(*parts: Any) -> str:
    """Identifies a request or a row by its content, whatever its place in a file."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


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
        """Everything that its answers depend on beside the prompt; it goes into keys and provenance."""
        ...

    def complete(self, requests: Sequence[Request]) -> Iterator[Response]:
        """Answers in any order, each as soon as it is there; a failed request is an answer with an error."""
        ...


class RecordStore:
    """A folder of JSON lines. Each process appends to a file of its own; killed at any moment, it keeps whole lines.

    Args:
        what: the rows, in the message of a disk that is full.
    """

    def __init__(self, folder: str | Path, rank: int = 0, *, what: str = "rationales"):
        self.folder, self._what = Path(folder), what
        self._own = self.folder / f"part-{rank:05d}.jsonl"

    def load(self) -> dict[str, Row]:
        """All rows of all processes, by their `key`."""
        found: dict[str, Row] = {}
        for part in sorted(self.folder.glob("part-*.jsonl")):
            for line in part.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    found[row["key"]] = row
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # the line that a killed writer left half-written
        return found

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows and flush them to disk.

        Raises:
            CheckpointError: there is no room for them.
        """
        with writing(self._what, self.folder, _REMEDY, keep_begun=True):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._own.open("a+b") as out:
                if out.tell():
                    out.seek(-1, os.SEEK_END)
                    if out.read(1) != b"\n":  # the line that a killed writer left half-written
                        out.write(b"\n")
                for row in rows:
                    out.write((json.dumps(row) + "\n").encode())  # ASCII: half a surrogate pair is no UTF-8
                out.flush()
                os.fsync(out.fileno())


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file, whole or not at all."""
    with writing("rationales", path.parent, _REMEDY, keep_begun=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.with_suffix(".tmp")
        begun.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        begun.replace(path)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSONL file.

    Raises:
        DatasetError: it is not there, or a line is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"There is no file {str(path)!r}. Run the stage before this one, or name a file as `input`.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{str(path)!r} is not in UTF-8: {error}. Convert it first.") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines also splits at U+2028 within a text
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise DatasetError(f"Line {number} of {str(path)!r} is no JSON: {error}.") from error
        if row is not None and not isinstance(row, dict):
            raise DatasetError(f"Line {number} of {str(path)!r} holds {type(row).__name__}, expected an object.")
        rows += [row] if row else []
    return rows


def dataset_of(rows: Sequence[Row]) -> Any:
    """Rows as a `datasets.Dataset` with the columns of all of them; nested provenance becomes JSON text."""
    from datasets import Dataset

    names = list(dict.fromkeys(name for row in rows for name in row))
    return Dataset.from_list([{name: _plain(row.get(name)) for name in names} for row in rows])


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
