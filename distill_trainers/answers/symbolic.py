"""Equality of mathematical expressions by math-verify, in a process of its own with a time limit.

An expression such as 9^9^9^9 keeps a computer algebra system busy in one call that no signal interrupts, and
math-verify's own time limit works in a main thread only. A process can be ended from outside, whatever it does.
Texts of models are not trusted either: see `symbolic_process.py` for what that process may not do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..exceptions import ConfigurationError
from ..installing import pip_install

logger = logging.getLogger(__name__)

_LONGEST = 500  # characters of an expression
_GRACE = 5.0  # seconds in which the process must say that a worker's time was over
_HURRIED = 0.2  # seconds for a question, once the budget is spent
_EARNED = 0.1  # of the budget, by a question that was answered in time
_ENVIRONMENT = (
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "SYSTEMROOT",
)  # all that the process gets of it: some Pythons need them


def is_available() -> bool:
    """Tell whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


def require_math_verify() -> None:
    """Raise ConfigurationError without math-verify."""
    if not is_available():
        raise ConfigurationError(
            f"Comparing mathematical expressions needs math-verify: {pip_install('rationales')}. Or set "
            "`kind: number`, which compares numbers, fractions and sums of them without it."
        )


class SymbolicEquality:
    """Answers whether two expressions are equal; safe to call from any thread, one question at a time.

    Args:
        seconds: for one question; what computes it is ended when it takes longer.
        start_seconds: for the process, which has to import sympy before its first question.
        budget: seconds that questions without an answer may take together. Once they are spent, a question has a
            fraction of a second, so that ten thousand hostile ones are over in minutes. Answered ones earn some back.
    """

    def __init__(self, seconds: float = 5.0, start_seconds: float = 60.0, budget: float = 60.0):
        self.seconds = seconds
        self.start_seconds = start_seconds
        self.timeouts = 0
        self._budget = self._left = budget
        self._number = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._end: Callable[[], Any] | None = None

    def __call__(self, answer: str, reference: str) -> bool | None:
        """Whether both are equal; None where that was not found out (out of time, too long, not an expression)."""
        if max(len(answer), len(reference)) > _LONGEST:
            return None
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                return self._ask(reference, answer)
            except (queue.Empty, OSError):
                self.timeouts += 1
                self.close()
                return None

    def close(self) -> None:
        """End the process and its worker, if there is one."""
        self._process, end, self._end = None, self._end, None
        if end is not None:
            end()

    def _ask(self, *texts: str) -> bool | None:
        assert self._process is not None and self._process.stdin is not None
        self._number += 1
        seconds = self.seconds if self._left > 0 else min(self.seconds, _HURRIED)
        self._process.stdin.write(json.dumps([self._number, seconds, *texts]) + "\n")
        self._process.stdin.flush()
        end = time.monotonic() + seconds + _GRACE
        while True:
            line = self._answers.get(timeout=max(0.0, end - time.monotonic()))
            if not line:
                raise OSError("the process ended")
            reply: Any = json.loads(line)
            if reply is None:  # the worker is gone; another one is there
                self.timeouts += 1
                self._spend(seconds)
                return None
            if reply[0] == self._number:  # else that of a worker that was too late
                self._left = min(self._budget, self._left + _EARNED)
                return reply[1]

    def _spend(self, seconds: float) -> None:
        before, self._left = self._left, self._left - seconds if self._left > 0 else 0.0
        if before > 0 >= self._left:
            logger.warning(
                "Expressions that could not be compared in time took %g s so far. From now on each has %g s instead of "
                "%g s; those that need longer are undecided, and count as not right.",
                self._budget,
                _HURRIED,
                self.seconds,
            )

    def _start(self) -> None:
        require_math_verify()
        self.close()  # one that died by itself has its pipes still
        self._answers = queue.Queue()
        spec = importlib.util.find_spec("math_verify")
        assert spec is not None and spec.origin is not None
        program = Path(__file__).with_name("symbolic_process.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(program), str(Path(spec.origin).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=os.sep,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,  # Ctrl-C is not for it, and its workers end with it
        )
        assert self._process.stdout is not None
        # At exit, or when nobody has this object any more; `atexit` would keep it and its process until then.
        self._end = weakref.finalize(self, _end, self._process)
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        if not self._answers.get(timeout=self.start_seconds):
            raise OSError("the process ended before its first question")


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows, where it has no workers
            process.kill()
    process.wait()
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # a question that was not sent yet
        process.stdin.close()


def _read(lines: IO[str], answers: queue.Queue[str]) -> None:
    for line in lines:
        answers.put(line)
    answers.put("")  # the process is gone: nobody waits for its time limit
