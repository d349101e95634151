"""Equality of mathematical expressions by math-verify, in a process of its own with a time limit.

An expression such as 9^9^9^9 keeps a computer algebra system busy in one call that no signal interrupts, and
math-verify's own time limit works in a main thread only. A process can be ended from outside, whatever it does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import IO, Any

from ..exceptions import ConfigurationError

_LONGEST = 500  # characters of an expression


def is_available() -> bool:
    """Tell whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


def require_math_verify() -> None:
    """Raise ConfigurationError without math-verify."""
    if not is_available():
        raise ConfigurationError(
            "Comparing mathematical expressions needs math-verify: pip install 'distill-trainers[rationales]'. Or set "
            "`kind: number`, which compares numbers, fractions and sums of them without it."
        )


class SymbolicEquality:
    """Answers whether two expressions are equal; safe to call from any thread, one question at a time.

    Args:
        seconds: for one question; the process is ended when it takes longer.
        start_seconds: for the first question of a process, which has to import sympy.
    """

    def __init__(self, seconds: float = 5.0, start_seconds: float = 60.0):
        self.seconds = seconds
        self.start_seconds = start_seconds
        self.timeouts = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._end: Callable[[], Any] | None = None

    def __call__(self, answer: str, reference: str) -> bool | None:
        """Whether both are equal; None where that was not found out (out of time, too long, not an expression)."""
        if max(len(answer), len(reference)) > _LONGEST:
            return None
        with self._lock:
            is_new = self._process is None or self._process.poll() is not None
            if is_new:
                self._start()
            assert self._process is not None and self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps([reference, answer]) + "\n")
                self._process.stdin.flush()
                reply = self._answers.get(timeout=self.start_seconds if is_new else self.seconds)
            except (queue.Empty, OSError):
                self.timeouts += 1
                self.close()
                return None
        return json.loads(reply) if reply else None

    def close(self) -> None:
        """End the process, if there is one."""
        self._process, end, self._end = None, self._end, None
        if end is not None:
            end()

    def _start(self) -> None:
        require_math_verify()
        self.close()  # one that died by itself has its pipes still
        self._answers = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from distill_trainers.answers.symbolic import _work; _work()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        # At exit, or when nobody has this object any more; `atexit` would keep it and its process until then.
        self._end = weakref.finalize(self, _end, self._process)
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # a question that was not sent yet
        process.stdin.close()


def _read(lines: IO[str], answers: queue.Queue[str]) -> None:
    for line in lines:
        answers.put(line)
    answers.put("")  # the process is gone: nobody waits for its time limit


def _work() -> None:
    """The process: one question a line, one answer a line."""
    from math_verify import parse, verify

    for line in sys.stdin:
        answer: bool | None = None
        try:
            gold, target = (parse(_as_latex(text), parsing_timeout=None) for text in json.loads(line))
            if gold and target:
                answer = bool(verify(gold, target, timeout_seconds=None))
        except Exception:  # whatever a parser of free text may raise: the answer is not known
            answer = None
        print(json.dumps(answer), flush=True)


def _as_latex(text: str) -> str:
    return text if "$" in text or r"\boxed" in text else f"${text}$"
