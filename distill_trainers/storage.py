"""Files that are whole or not there, and records that are appended and found again by their key."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import xxhash

from .exceptions import CacheError, CheckpointError, ConfigurationError, DatasetError
from .settings import require, shown

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# What safetensors calls the dtypes of torch.
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}
_DTYPES |= {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}
_DTYPES |= {"uint64": "U64", "uint32": "U32", "uint16": "U16"}
_DTYPES |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


def _this_machine() -> str:
    """Tell machines apart, and containers, whose processes have numbers of their own."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        name += os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(name.encode()):08x}"


_MACHINE = _this_machine()
_ABANDONED_SECONDS = 3600.0  # of a temporary file that another machine began
_LONGEST_BELOW = 512  # bytes of names of files in a folder
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


@contextlib.contextmanager
def writing(what: str, folder: Path, remedy: str, error_class: type[OSError] = CheckpointError) -> Iterator[None]:
    """Write, within it, `what` into `folder`.

    Raises:
        CheckpointError: what could not be written where and why, how much space there is, and the remedy.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (CacheError, CheckpointError):
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError is what torch.save raises on a full disk
        number = error.errno if isinstance(error, OSError) else None
        if number in _NO_RIGHT:
            remedy = "This process may not write there: change that, or name another folder."
        elif number in _IN_THE_WAY:
            remedy = "Something else is in the way: move it, or name another folder."
        elif number is None or number in _NO_ROOM:
            remedy = f"{_free_mib(folder)} MiB are free there. {remedy}"
        raise error_class(f"Could not write {what} to {str(folder)!r}: {error}. {remedy}") from error


def check_folder(name: str, folder: str | Path, *, writable: bool = True) -> None:
    """Refuse a folder that is a file or that cannot be written into, before there is anything to write.

    Args:
        name: the setting that names it. It may be missing, and then is made later.

    Raises:
        ConfigurationError: naming the setting.
    """
    require("\0" not in str(folder), name, folder, "a folder, whose name has no character NUL")
    there = Path(os.path.expanduser(folder))
    require(not there.parts[:1] or there.parts[0][0] != "~", name, folder, "the home of a user whom this machine has")
    there = there.absolute()
    try:
        while not os.path.lexists(there):
            there = there.parent
        known = hasattr(os, "pathconf")  # Windows has none
        longest, whole = (os.pathconf(there, f"PC_{n}_MAX") if known else 255 for n in ("NAME", "PATH"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigurationError(
            f"Got `{name}: {shown(folder)}`; expected a folder: {reason}. Name another one."
        ) from error
    require(there.is_dir(), name, folder, f"a folder, but {shown(there)} is a file. Name another one")
    parts = Path(os.path.expanduser(folder)).parts
    require(all(len(os.fsencode(p)) <= longest for p in parts), name, folder, f"names of at most {longest} bytes")
    room = whole - _LONGEST_BELOW if known else len(os.fsencode(Path(*parts)))
    require(len(os.fsencode(Path(*parts).absolute())) <= room, name, folder, f"a path of at most {room} bytes")
    fits = not writable or os.access(there, os.W_OK | os.X_OK)
    require(fits, name, folder, f"a folder to write into, and {shown(there)} is none for this user")


def write_file(
    path: Path,
    data: bytes | str,
    what: str,
    remedy: str,
    error_class: type[OSError] = CheckpointError,
    *,
    private: bool = False,
) -> Path:
    """Put `what` at `path`: wholly and durably, or not at all; its folder is made.

    It is written beside and renamed, which is one step for whoever reads or is killed meanwhile. A link at `path` is
    replaced, not followed.

    Args:
        private: nobody but its owner may read it.

    Raises:
        CheckpointError: as `writing`.
    """
    with writing(what, path.parent, remedy, error_class):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (path.is_file() or path.is_symlink()):
            raise FileExistsError(errno.EEXIST, "There is something that is no file", str(path))
        temporary, mode = _beside(path), 0o600 if private else 0o666
        try:
            with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as out:
                out.write(data.encode("utf-8", "replace") if isinstance(data, str) else data)
                out.flush()
                os.fsync(out.fileno())
            if path.is_file() and not path.is_symlink() and not private:
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Put a part of a cache at `path`: wholly and durably, or not at all.

    Raises:
        CacheError: the disk is full, or the folder cannot be written to.
    """
    remedy = "What the cache held before is intact; make room and start again, which goes on from there."
    write_file(path, data, f"{len(data) / 2**20:.1f} MiB", remedy, CacheError)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a folder in `parent` that is removed at the end; if the process is killed, by the next one that writes."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = _beside(parent / "scratch")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing_folder(folder: Path, what: str, remedy: str) -> Iterator[Path]:
    """Give a folder to fill, which then takes the place of `folder`: wholly and durably, or not at all.

    Raises:
        CheckpointError: as `writing`; what was there before still is.
    """
    kept = folder.with_name(f".{folder.name}.replaced")
    with writing(what, folder, remedy):
        if kept.is_dir() and not folder.exists():  # killed between the two renames below
            kept.rename(folder)
        with scratch_folder(folder.parent) as scratch:
            filled = scratch / folder.name
            filled.mkdir()
            yield filled
            for file in (*filled.rglob("*"), filled):
                _sync(file)
            _remove(kept)
            if os.path.lexists(folder):
                folder.rename(kept)
            try:
                filled.rename(folder)
            except OSError:
                if os.path.lexists(kept):
                    kept.rename(folder)
                raise
            _sync(folder.parent)
            _remove(kept)


@contextlib.contextmanager
def writing_into(folder: Path, what: str, remedy: str, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Give a folder to fill, whose files then go to `folder`, each wholly, beside what is there.

    Args:
        replaces: patterns of files that belong together: of those that were there, only the new ones stay.

    Raises:
        CheckpointError: as `writing`; where they could not all be written, none has gone there.
    """
    with writing(what, folder, remedy), scratch_folder(folder) as scratch:
        filled = scratch / folder.name
        filled.mkdir()
        yield filled
        files = sorted(file for file in filled.rglob("*") if file.is_file())
        for file in files:
            _sync(file)
        for file in files:
            target = folder / file.relative_to(filled)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        matching = {file for pattern in replaces for file in folder.glob(pattern)}
        written = {folder / file.relative_to(filled) for file in files}
        for file in matching - written if matching & written else ():
            file.unlink()
        _sync(folder)


def append_lines(path: Path, lines: Iterable[str], what: str, remedy: str) -> None:
    """Add lines to a file and flush them to disk; those of several processes do not mix.

    Raises:
        CheckpointError: as `writing`.
    """
    with writing(what, path.parent, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as out:
            data = "".join(line + "\n" for line in lines).encode("utf-8", "replace")
            if out.tell():
                out.seek(-1, os.SEEK_END)
                if out.read(1) != b"\n":  # the line that a killed writer left half-written
                    data = b"\n" + data
            while data:
                data = data[out.write(data) :]  # all of it at once, but on a full disk
            os.fsync(out.fileno())


def _beside(path: Path) -> Path:
    """Return a name beside `path` that nobody else takes, and remove what killed processes left there."""
    _sweep(path.parent)
    return path.with_name(f".{_MACHINE}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


@functools.lru_cache(maxsize=64)  # once per folder; a run writes into ever new ones
def _sweep(folder: Path) -> None:
    """Remove temporary files and folders of processes of this machine that are dead, and old ones."""
    for left in folder.glob(".*.tmp"):
        host, _, rest = left.name[1:].partition("-")
        pid = rest.partition("-")[0]
        with contextlib.suppress(OSError):
            is_dead = host == _MACHINE and pid.isdigit() and not psutil.pid_exists(int(pid))
            if is_dead or time.time() - left.lstat().st_mtime > _ABANDONED_SECONDS:
                _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make a file durable, or the renames of a folder, where folders can be synchronised."""
    with contextlib.suppress(OSError) if path.is_dir() or os.name == "nt" else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _free_mib(folder: Path) -> str:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:,.0f}"


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return tensors on the CPU, and texts beside them, as a safetensors file.

    `safetensors.torch.save` has ctypes make types for each new number of bytes, and ctypes keeps them, 6 KiB each, for
    good: who writes tensors of ever other sizes would grow without end.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, end = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):  # each begins where it may
        values = tensors[name].detach().reshape(-1)
        parts.append(values.view(torch.uint8).numpy().data if len(values) else b"")
        start, end = end, end + values.nbytes
        dtype = _DTYPES[str(values.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


Record = dict[str, Any]

_REMEDY = "What was written earlier is kept: free some space and start again."


def content_key(*parts: Any) -> str:
    """Identify a request or a row by its content, whatever its place in a file."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


_SEAL = b', "xxh3": "'


def _sealed(row: Record) -> str:
    """One line of JSON, the last field of which is the checksum of what is before it."""
    text = json.dumps(row)[:-1]  # ASCII: half a surrogate pair is no UTF-8
    return f'{text}{_SEAL.decode()}{xxhash.xxh3_64_hexdigest(text.encode())}"}}'


def _unsealed(line: bytes) -> Record | None:
    """The row of a line; None if a killed writer left it half-written, or it is not as it was written."""
    text, _, seal = line.rpartition(_SEAL)
    whole = text and seal == b'%s"}' % xxhash.xxh3_64_hexdigest(text).encode()
    return json.loads(text + b"}") if whole else None


class RecordStore:
    """A folder of JSON lines. Each process appends to a file of its own; killed at any moment, it keeps whole lines.

    Each line ends with its own checksum, so that a damaged one is asked for again and never believed.

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
        """Read all rows of all processes, by their key.

        Raises:
            CheckpointError: a file cannot be read.
        """
        rows: dict[str, Record] = {}
        for part in sorted(self.folder.glob("part-*.jsonl")):
            try:
                lines = part.read_bytes().split(b"\n")
            except OSError as error:
                raise CheckpointError(
                    f"Could not read {self._what} in {str(part)!r}: {error}. Make it readable, or remove it: what it "
                    "held is then made again."
                ) from error
            read = [_unsealed(line) for line in lines]
            if damaged := sum(row is None for row, line in zip(read[:-1], lines, strict=False) if line):
                logger.warning("%d of the lines of %s are cut or damaged, and are made again.", damaged, part)
            rows |= {row[self._key]: row for row in read if row is not None and self._key in row}
        return rows

    def append(self, rows: Iterable[Record]) -> None:
        """Add rows and flush them to disk.

        Raises:
            CheckpointError: there is no room for them.
        """
        append_lines(self._own, map(_sealed, rows), self._what, self._remedy)


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
