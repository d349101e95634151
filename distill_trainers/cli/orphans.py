"""What one process of several does when the launcher that started it is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

POLL_SECONDS = 1.0
GRACE_SECONDS = 120.0  # to finish a step and save


def end_with_launcher() -> None:
    """End this process when its launcher dies, as the launcher would have it end: with SIGTERM, which saves.

    A launcher that is killed (out of memory, `kill -9`) tells its processes nothing. They would train on unseen, and
    write into the folder in which the run is soon started again. Only processes of a launch of several are watched.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="launcher watch").start()


def _is_adopted(parent: int) -> bool:
    """Whether the launcher was gone before this process could look: torch's is a Python program, init is not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not Path("/proc/self/exe").exists():
        return False
    try:
        return not Path(os.readlink(f"/proc/{parent}/exe")).name.startswith("python")
    except OSError:  # another user's, or gone by now
        return True


def _watch(launcher: int) -> None:
    while os.getppid() == launcher and not _is_adopted(launcher):
        time.sleep(POLL_SECONDS)
    print(f"The launcher (process {launcher}) is gone: saving and stopping.", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)  # it waits for a process that will not answer
