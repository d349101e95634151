"""Files that are whole or not there, and records that are appended and found again by their key."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .exceptions import CacheError, CheckpointError, DatasetError


@contextlib.contextmanager
def writing(what: str, folder: Path, remedy: str, *, keep_begun: bool = False) -> Iterator[None]:
    """Write, within it, `what` into `folder`; if that fails, remove files begun unless `keep_begun`.

    Raises:
        CheckpointError: what could not be written where and why, how much space there is, and the remedy.
    """
    from safetensors import SafetensorError

    before = _stamps(folder)
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError is what torch.save raises on a full disk
        for file, stamp in _stamps(folder).items():
            if not keep_begun and before.get(file) != stamp:
                file.unlink(missing_ok=True)
        raise CheckpointError(
            f"Could not write {what} to {str(folder)!r}: {error}. {_free_mib(folder)} MiB are free there. {remedy}"
        ) from error


def _stamps(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.glob("*") if file.is_file()}


def write_file(path: Path, data: bytes | str, what: str, remedy: str, *, private: bool = False) -> Path:
    """Put `what` at `path`: wholly and durably, or not at all; its folder is made.

    Args:
        private: nobody but its owner may read it.

    Raises:
        CheckpointError: as `writing`.
    """
    with writing(what, path.parent, remedy, keep_begun=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data, 0o600 if private else 0o666)
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Put a part of a cache at `path`: wholly and durably, or not at all.

    Raises:
        CacheError: the disk is full, or the folder cannot be written to.
    """
    try:
        _replace(path, data)
    except OSError as error:
        raise CacheError(
            f"Could not write {len(data) / 2**20:.1f} MiB to {path}: {error}. {_free_mib(path.parent)} MiB are free "
            "there. What the cache held before is intact; make room and start again, which goes on from there."
        ) from error


def _replace(path: Path, data: bytes | str, mode: int = 0o666) -> None:
    """Write beside `path` and rename, which is one step for whoever reads or is killed meanwhile."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, mode)) as out:
            out.write(data.encode("utf-8", "replace") if isinstance(data, str) else data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where folders can be synchronised."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _free_mib(folder: Path) -> str:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:,.0f}"


Record = dict[str, Any]

_REMEDY = "What was written earlier is kept: free some space and start again."


def content_key(*parts: Any) -> str:
    """Identify a request or a row by its content, whatever its place in a file."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


class RecordStore:
    """A folder of JSON lines. Each process appends to a file of its own; killed at any moment, it keeps whole lines.

    Args:
        what, remedy: of the rows, in the message of a disk that is full.
        key: the field by which a row is found again.
    """

    def __init__(
        self, folder: str | Path, rank: int = 0, *, what: str = "rationales", remedy: str = _REMEDY, key: str = "key"
    ):
        self.folder, self._what, self._remedy, self._key = Path(folder), what, remedy, key
        self._own = self.folder / f"part-{rank:05d}.jsonl"

    def load(self) -> dict[str, Record]:
        """Read all rows of all processes, by their key."""
        rows: dict[str, Record] = {}
        for part in sorted(self.folder.glob("part-*.jsonl")):
            for line in part.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    rows[row[self._key]] = row
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # the line that a killed writer left half-written
        return rows

    def append(self, rows: Iterable[Record]) -> None:
        """Add rows and flush them to disk.

        Raises:
            CheckpointError: there is no room for them.
        """
        with writing(self._what, self.folder, self._remedy, keep_begun=True):
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
    """Write a JSONL file, whole or not at all."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows), "rationales", _REMEDY)


def read_rows(path: str | Path) -> list[Record]:
    """Read the rows of a JSONL file.

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
