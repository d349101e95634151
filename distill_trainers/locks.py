"""One run, one folder: a lock that its owner's death sets free."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from .exceptions import ConfigurationError

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_PATIENCE = 1.0  # for an owner that is just letting go, or has not said yet who it is
BEAT_SECONDS = 10.0  # between an owner's signs of life
WATCH_SECONDS = 35.0  # without one, an owner on another machine is dead
_OLD_SECONDS = 3600.0  # no two clocks are so far apart


@dataclass
class _Hold:
    """What this process holds.

    Attributes:
        lock: None where the file system has no locks, or cannot be written to.
        made: folders that were made for it, deepest first.
        times: how often it is held, one within the other or in several threads.
    """

    lock: FileLock | None
    owner_file: Path
    made: list[Path]
    times: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def beat(self) -> None:
        """Touch the file that names the owner: where the lock does not reach, other machines watch for it."""
        while not self.stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.owner_file)

    def release(self) -> None:
        self.stop.set()
        if self.lock is not None:
            for file in (self.owner_file, Path(self.lock.lock_file)):  # while it is held: nobody else's is removed
                with contextlib.suppress(OSError):
                    file.unlink()
            self.lock.release()
        with contextlib.suppress(OSError):  # something is in it now
            for folder in self.made:
                folder.rmdir()


_held: dict[Path, _Hold] = {}
_guard = threading.Lock()


def _forget() -> None:
    global _guard
    _guard = threading.Lock()  # another thread of the parent may have had it
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def holding(path: str | Path, setting: str = "output_dir", *, beside: bool = False) -> Iterator[None]:
    """Be, within it, the only process that writes to `path`; the same process may hold it again inside.

    The kernel gives the lock back when its owner dies, whatever children live on. Where a file system has no locks or
    cannot be written to, a warning says so.

    Args:
        path: a folder, which is made if need be.
        setting: by which the user named it, for the message.
        beside: `path` is a file, or a folder that appears whole: its lock lies beside it.

    Raises:
        ConfigurationError: another process is writing there, or the folder cannot be made.
    """
    path = Path(os.path.expanduser(path)).absolute()
    path = path.parent.resolve() / path.name if beside else path.resolve()
    with _guard:
        if path not in _held:
            _held[path] = _acquire(path, setting, beside)
        hold = _held[path]
        hold.times += 1
    try:
        yield
    finally:
        with _guard:
            if _held.get(path) is hold:  # else this is a child that was forked within
                hold.times -= 1
                if not hold.times:
                    del _held[path]
                    hold.release()


def holding_run(path: str | Path, setting: str = "output_dir") -> contextlib.AbstractContextManager[None]:
    """Hold a folder for a launch of several processes, before any of them talks to the others: the first one does."""
    return holding(path, setting) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext()


def _acquire(path: Path, setting: str, beside: bool) -> _Hold:
    folder = path.parent if beside else path
    lock_file = folder / (f".{path.name}{LOCK_NAME}" if beside else LOCK_NAME)
    owner_file = lock_file.with_name(f"{lock_file.name}.json")
    hold = _Hold(None, owner_file, _make(folder, setting))
    lock = FileLock(lock_file, thread_local=False)
    try:
        lock.acquire(timeout=_PATIENCE, poll_interval=0.05)
        hold.lock = lock
        while not _write_owner(owner_file):
            owner = _read_owner(owner_file)
            if owner.get("host") not in (None, socket.gethostname()) and _is_beating(owner_file, owner):
                lock.release()
                raise ConfigurationError(_in_use(path, setting, owner))
            with contextlib.suppress(FileNotFoundError):
                owner_file.unlink()
    except Timeout as error:
        raise ConfigurationError(_in_use(path, setting, _read_owner(owner_file))) from error
    except (OSError, NotImplementedError) as error:
        if not folder.exists():  # removed just now, by one who made it and let go
            return _acquire(path, setting, beside)
        owner = _read_owner(owner_file)
        if hold.lock is None and _is_alive(owner):  # another user's, say
            raise ConfigurationError(_in_use(path, setting, owner)) from error
        logger.warning("%s cannot be locked (%s): see to it that no other run writes there.", path, error)
        return hold
    threading.Thread(target=hold.beat, daemon=True, name="lock").start()
    return hold


def _make(folder: Path, setting: str) -> list[Path]:
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "is a file" if folder.exists() else f"cannot be made ({error})"
        raise ConfigurationError(f"Got the folder {str(folder)!r}, which {what}. Set another `{setting}`.") from error
    return missing


def _write_owner(file: Path) -> bool:
    """Say who owns the lock; False if somebody has said so already."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    process = psutil.Process()
    owner = {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time(), "since": now}
    try:
        with open(file, "x", encoding="utf-8") as out:  # of two machines one alone can make it
            out.write(json.dumps(owner))
    except FileExistsError:
        return False
    except OSError as error:  # a full disk: the lock holds, without words
        logger.debug("%s: %s", file, error)
    return True


def _read_owner(file: Path) -> dict[str, Any]:
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(owner: dict[str, Any]) -> bool:
    """Tell whether this machine runs that very process, and not another of its number."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 5  # clocks are corrected
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _is_beating(file: Path, owner: dict[str, Any]) -> bool:
    """Watch whether another machine's process shows signs of life; clocks of two machines need not agree."""
    seen = _touched(file)
    if seen is None or abs(time.time() - seen) > _OLD_SECONDS:
        return False
    logger.warning(
        "%s was left by process %s on %s; watching for %.0f s whether that still runs.",
        file,
        owner.get("pid"),
        owner.get("host"),
        WATCH_SECONDS,
    )
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_SECONDS / 10))
        now = _touched(file)
        if now != seen:
            return now is not None
    return False


def _touched(file: Path) -> float | None:
    try:
        with open(file, "rb") as opened:  # network file systems look anew when a file is opened
            return os.fstat(opened.fileno()).st_mtime
    except OSError:
        return None


def _in_use(path: Path, setting: str, owner: dict[str, Any]) -> str:
    pid, host = owner.get("pid"), owner.get("host")
    who = f"process {pid} on {host}, since {owner.get('since')}" if pid else "another process"
    stop = f"stop it (`kill {pid}` on {host})" if pid else "stop it"
    return f"{str(path)!r} is being written by {who}. Wait until it ends, {stop}, or set another `{setting}`."
