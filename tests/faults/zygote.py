"""A process that has imported all that a command needs, and forks a child for each: a command then takes what it runs.

It reads one request a line and answers each with one line of JSON. A request is `{argv, cwd, log, fault}`; `fault`
holds what is to go wrong in the child:

    folder            events are what Python opens for writing, renames, makes or removes below it (an audit hook)
    event, signal     the child gets the signal at that event, or
    event, full       from that event on there is no space: ENOSPC
    file_bytes        no file can grow beyond so many bytes
    disk_kib          `folder` lies on a disk of its own of that size, and is copied back at the end
    seconds, signal   the child gets the signal after so many seconds
    clock             [call, seconds]: at that call of time.time the clock jumps
    limits            root's right to read everything is given up
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
LIBC = ctypes.CDLL(None, use_errno=True)


class Events:
    """Counts what is changed below a folder, and strikes at one of these moments."""

    def __init__(self, folder: str, event: int | None = None, signal: int | None = None, full: bool = False):
        self.folder, self.event, self.signal, self.full = folder, event, signal, full
        self.count, self.inside = 0, False

    def __call__(self, name, args):
        if self.inside or not (name in CHANGES or (name == "open" and len(args) == 3)):
            return
        if name == "open" and not ((args[2] or 0) & WRITES):
            return
        self.inside = True  # what follows raises events, too
        try:
            path = os.path.abspath(os.fsdecode(args[0])) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
            if path.startswith(self.folder):
                self.count += 1
                self.strike(name)
        finally:
            self.inside = False

    def strike(self, name):
        if self.event is None:
            return
        if self.full:
            if self.count >= self.event and name in ("open", "os.mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif self.count == self.event:
            os.kill(os.getpid(), self.signal)


class Clock:
    """A clock that jumps once."""

    def __init__(self, call: int, seconds: float):
        self.left, self.seconds, self.real = call, seconds, time.time

    def __call__(self):
        self.left -= 1
        return self.real() + (self.seconds if self.left < 0 else 0.0)


def own_disk(folder: Path, kib: int) -> None:
    """Mount a small disk over the folder, in a name space of this process, and put there what the folder holds."""
    ids = os.getuid(), os.getgid()
    if LIBC.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    for name, number in zip(("uid_map", "gid_map"), ids, strict=True):
        Path(f"/proc/self/{name}").write_text(f"0 {number} 1")
    kept = folder.with_name(folder.name + ".kept")
    shutil.copytree(folder, kept, copy_function=shutil.copy2)
    if LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={kib}k".encode()):
        raise OSError(ctypes.get_errno(), "mount")
    shutil.copytree(kept, folder, dirs_exist_ok=True, copy_function=shutil.copy2)
    shutil.rmtree(kept)


def give_up_rights() -> None:
    """Read and write only what the mode of a file allows, as root too."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if LIBC.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    data[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of the effective ones
    if LIBC.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def child(request: dict, words: int) -> None:
    """Run the command with its fault, say all into a pipe, and end with its status."""
    fault = request.get("fault") or {}
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(words, 1)
    os.dup2(words, 2)
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code, events = 1, None
    try:
        folder = fault.get("folder")
        if "disk_kib" in fault:
            own_disk(Path(folder), fault["disk_kib"])
        if "limits" in fault:
            give_up_rights()
        if "file_bytes" in fault:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_bytes"], resource.RLIM_INFINITY))
        if "clock" in fault:
            time.time = Clock(*fault["clock"])
        if folder:
            striking = {name: fault[name] for name in ("event", "signal", "full") if name in fault}
            events = Events(folder, **(striking if "event" in fault else {}))
            sys.addaudithook(events)
        from distill_trainers.cli import main

        code = main(request["argv"])
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        told = {"events": events.count if events else 0}
        if events:
            events.inside = True
        if "file_bytes" in fault:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        if request.get("modules"):
            told["modules"] = list(sys.modules)  # in the order in which they were imported
        if "disk_kib" in fault:
            # What a mount of this process holds is seen by nobody else.
            shutil.copytree(fault["folder"], request["log"] + ".disk", copy_function=shutil.copy2)
        Path(request["log"] + ".told").write_text(json.dumps(told))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def read_all(pipe: int) -> bytes:
    """What has been written into a pipe by now."""
    text = b""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(pipe, 2**16):
            text += piece
    return text


def run(request: dict) -> dict:
    """Fork, strike from outside if that is asked for, and wait."""
    words, told_words = os.pipe()  # a file could be full
    pid = os.fork()
    if pid == 0:
        child(request, told_words)
    os.close(told_words)
    os.set_blocking(words, False)
    text = b""
    fault, limit = request.get("fault") or {}, request.get("limit", 120.0)
    start, struck, late = time.monotonic(), "seconds" not in fault, False
    while True:
        text += read_all(words)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        seconds = time.monotonic() - start
        if not struck and seconds > fault["seconds"]:
            os.kill(pid, fault["signal"])
            struck = True
        if seconds > limit:
            os.kill(pid, signal.SIGKILL)
            late = True
        time.sleep(0.002)
    text += read_all(words)
    os.close(words)
    Path(request["log"]).write_bytes(text)
    told = Path(request["log"] + ".told")
    more = json.loads(told.read_text()) if told.exists() else {}
    told.unlink(missing_ok=True)
    return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start, "late": late, **more}


def warm() -> None:
    """Do once what every command would do for itself, and draw no pictures: they take half of a short run."""
    from transformers import conversion_mapping

    from distill_trainers.rationales import stages
    from distill_trainers.teachers.cache.shards import TeacherCache

    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    # Small parts, so that there are several of each.
    TeacherCache.__init__.__defaults__ = (6000,)
    stages._FLUSHED_TOGETHER = 4
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # as where it is not installed


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what modules print when they are imported is no answer
    for line in sys.stdin:
        request = json.loads(line)
        if "import" in request:
            for name in request["import"]:
                try:
                    importlib.import_module(name)
                except Exception:  # what is made while running, or wants another order
                    pass
            warm()
            gc.collect()
            gc.freeze()  # else each child would walk through, and so copy, all that is imported
            answer = {}
        else:
            answer = run(request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
