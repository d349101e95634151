"""A teacher's answers on disk: shards of rows, each found by the content of its row.

A row is what the teacher said about the trained tokens of one dataset row, as a few arrays. Rows are never addressed by
step or by place in the dataset, so shuffling, further epochs, other batches and other processes find them again.

A shard is one safetensors file with the arrays of its rows joined end to end, and the index that parts them again:
keys, token counts, offsets and checksums. It is written beside its place and then renamed, so that it is there whole or
not at all; a killed writer loses the rows it had not yet written out. Every writer names its shards with a token of its
own.
"""

from __future__ import annotations

import logging
import os
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...exceptions import CacheError
from ...storage import tensor_bytes, write_atomically

logger = logging.getLogger(__name__)

Answer = dict[str, Tensor]

SHARD_BYTES = 64 * 2**20
_KEY_BYTES = 16
_OPEN_FILES = 128  # mapped at once per process, well below the usual limit of 1024 open files
_DATA, _OFFSETS = "row.", "offsets."


@dataclass
class _Shard:
    """A shard's index: which row lies where, and whether its checksum was found right by this process."""

    path: Path
    tokens: np.ndarray
    checksums: np.ndarray
    offsets: dict[str, np.ndarray]
    checked: np.ndarray


class TeacherCache:
    """The rows in one folder, read by many processes and written by any number of them.

    Args:
        folder: made if it is not there.
        stamp: names what all rows depend on; shards with another stamp are left alone, with a warning.
        shard_bytes: rows are written out whenever so many bytes have come together.

    Raises:
        CacheError: the folder cannot be made or read.
    """

    def __init__(self, folder: str | Path, stamp: str, shard_bytes: int = SHARD_BYTES):
        self.folder = Path(folder)
        self.stamp = stamp
        self.shard_bytes = shard_bytes
        self.damaged: dict[str, str] = {}
        """Shards that could not be used, wholly or in part: name and reason."""
        self._shards: dict[str, _Shard] = {}
        self._where: dict[bytes, tuple[_Shard, int]] = {}
        self._pending: dict[bytes, tuple[Answer, int]] = {}
        self._pending_bytes = 0
        self._files: dict[Path, Answer] = {}
        self._writer = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._written = 0
        self._seen_at: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"The folder {self.folder} of the teacher cache cannot be made: {error}.") from error
        self.refresh()

    def __len__(self) -> int:
        return len(self._where.keys() | self._pending.keys())

    def __contains__(self, key: bytes) -> bool:
        return key in self._where or key in self._pending

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    @property
    def num_tokens(self) -> int:
        """Trained tokens of all rows."""
        on_disk = sum(int(shard.tokens[row]) for shard, row in self._where.values())
        return on_disk + sum(tokens for _, tokens in self._pending.values())

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, heads and damaged shards included."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())

    def keys(self) -> list[bytes]:
        """Return the keys of all rows."""
        return list(self._where.keys() | self._pending.keys())

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Take in shards that others have written since the last look; nearly free where nothing changed."""
        try:
            changed_at = self.folder.stat().st_mtime_ns
            if changed_at == self._seen_at:
                return
            known = self._shards.keys() | self.damaged.keys()
            new = [path for path in self.folder.glob("shard-*.safetensors") if path.name not in known]
            # A row that was found damaged is written anew, so the latest copy is the one to read.
            for path in sorted(new, key=lambda path: (path.stat().st_mtime_ns, path.name)):
                self._take_in(path)
        except OSError as error:
            raise CacheError(f"The teacher cache {self.folder} cannot be read: {error}.") from error
        self._seen_at = changed_at

    def _take_in(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                index = {n: file.get_tensor(n).numpy() for n in file.keys() if not n.startswith(_DATA)}  # noqa: SIM118
            if metadata.get("index") != _index_checksum(index):
                raise ValueError("its index does not have the checksum it was written with")
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            self._report_damage(path, f"cannot be opened ({error})")
            return
        if metadata.get("stamp") != self.stamp:
            self._report_damage(path, "was written under another identity than this cache's (copied from elsewhere?)")
            return
        keys = index["keys"].tobytes()
        offsets = {name.removeprefix(_OFFSETS): values for name, values in index.items() if name.startswith(_OFFSETS)}
        rows = len(index["tokens"])
        shard = _Shard(path, index["tokens"], index["checksums"], offsets, np.zeros(rows, dtype=bool))
        self._shards[path.name] = shard
        for row in range(rows):
            self._where[keys[row * _KEY_BYTES : (row + 1) * _KEY_BYTES]] = (shard, row)

    def read(self, key: bytes) -> Answer | None:
        """Read the row of `key`; None if it is missing or damaged (which is reported once)."""
        if key in self._pending:
            return self._pending[key][0]
        if key not in self._where:
            return None
        shard, number = self._where[key]
        try:
            arrays = self._open(shard.path)
            row = {
                name: arrays[_DATA + name][int(offsets[number]) : int(offsets[number + 1])]
                for name, offsets in shard.offsets.items()
            }
            if not shard.checked[number] and row_checksum(key, row) != shard.checksums[number]:
                raise ValueError("its bytes do not have the checksum they were written with")
        except (SafetensorError, OSError, ValueError) as error:
            del self._where[key]
            self._report_damage(shard.path, f"row {number} cannot be read ({error})")
            return None
        shard.checked[number] = True
        return row

    def _open(self, path: Path) -> Answer:
        """The arrays of a mapped file; the one unused for longest is closed when there are many."""
        arrays = self._files.pop(path, None)
        if arrays is None:
            with safe_open(path, framework="pt") as file:
                # Views of the mapping. safetensors loses some bytes for good with each slice that it is asked for.
                arrays = {name: file.get_tensor(name) for name in file.keys() if name.startswith(_DATA)}  # noqa: SIM118
            while len(self._files) >= _OPEN_FILES:
                self._files.pop(next(iter(self._files)))
        self._files[path] = arrays
        return arrays

    def _report_damage(self, path: Path, reason: str) -> None:
        if path.name not in self.damaged:
            logger.warning("Shard %s of the teacher cache %s.", path, reason)
        self.damaged[path.name] = reason

    # ---- Writing ----------------------------------------------------------------------------------------------------

    def add(self, key: bytes, row: Mapping[str, Tensor], tokens: int) -> None:
        """Keep the row of `key`; it is on disk after the next `flush`, or when a shard is full.

        Args:
            row: arrays whose first axis may have any length; all rows have the same names and trailing shapes.
            tokens: trained tokens that the row answers.

        Raises:
            CacheError: the shard could not be written; nothing of it is left behind.
        """
        arrays = {name: values.detach().to("cpu").contiguous() for name, values in row.items()}
        self._pending[key] = (arrays, tokens)
        self._pending_bytes += sum(values.nbytes for values in arrays.values())
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write out what has come together.

        Raises:
            CacheError: the shard could not be written; nothing of it is left behind.
        """
        if not self._pending:
            return
        keys, rows = list(self._pending), [row for row, _ in self._pending.values()]
        index: dict[str, np.ndarray] = {
            "keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
            "tokens": np.array([tokens for _, tokens in self._pending.values()], dtype=np.int64),
            "checksums": np.array([row_checksum(*keyed) for keyed in zip(keys, rows, strict=True)], dtype=np.int64),
        }
        for name in rows[0]:
            index[_OFFSETS + name] = np.cumsum([0, *(len(row[name]) for row in rows)], dtype=np.int64)
        tensors = {_DATA + name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        tensors |= {name: torch.from_numpy(values.copy()) for name, values in index.items()}
        metadata = {"stamp": self.stamp, "index": _index_checksum(index)}
        path = self.folder / f"shard-{self._writer}-{self._written:05d}.safetensors"
        write_atomically(path, tensor_bytes(tensors, metadata))
        self._written += 1
        self._pending, self._pending_bytes = {}, 0
        self._take_in(path)

    def remove_unreadable(self) -> list[str]:
        """Delete the shards that cannot be opened at all, and name them; the rows they held count as missing.

        Raises:
            CacheError: one cannot be deleted.
        """
        names = [name for name, reason in self.damaged.items() if reason.startswith("cannot be opened")]
        for name in names:
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                raise CacheError(
                    f"The shard {self.folder / name} of the teacher cache can be neither opened nor removed: {error}. "
                    "Remove it, and start again: its rows are asked for again."
                ) from error
            del self.damaged[name]
        return names


def row_checksum(key: bytes, row: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of a key and named arrays."""
    checksum = zlib.crc32(key)
    for name in sorted(row):
        values = row[name].contiguous()
        checksum = zlib.crc32(values.view(torch.uint8).numpy().data if values.numel() else b"", checksum)
    return checksum


def _index_checksum(index: Mapping[str, np.ndarray]) -> str:
    checksum = 0
    for name in sorted(index):
        checksum = zlib.crc32(np.ascontiguousarray(index[name]).data, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"
