"""What compares expressions, in a process of its own: `python -I` runs this file, which imports nothing of ours.

Texts of a model get into a computer algebra system here, so this process has no secrets, writes no file, and is
bounded in memory. A worker answers; its parent, this process, has everything imported and forks another at once where
one was ended. Windows has neither limits nor forks: there this process answers, and is ended from outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys

_MEMORY = 4 * 2**30  # bytes of address space


def main() -> None:
    """Say that all is imported; then fork workers, one after the other, until nobody asks any more."""
    sys.path.append(sys.argv[1])  # where math-verify is: -I leaves a user's own packages out
    _give_up_rights()
    from math_verify import parse, verify

    verify(parse("$x+1$", parsing_timeout=None), parse("$1+x$", parsing_timeout=None), timeout_seconds=None)
    print(json.dumps(None), flush=True)
    if not hasattr(os, "fork"):
        _work(parse, verify)
        return
    while True:
        worker = os.fork()
        if not worker:
            _work(parse, verify)
            os._exit(0)
        _, status = os.waitpid(worker, 0)
        if status == 0:
            return
        print(json.dumps(None), flush=True)  # its time was over


def _give_up_rights() -> None:
    try:
        import resource
    except ImportError:
        return
    for limit, most in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, _MEMORY)):
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # no such limit on this system
            resource.setrlimit(limit, (most, most))


def _work(parse, verify) -> None:
    """Answer questions: a line has a number, seconds and both texts, its answer the number and what was found."""
    alarm = getattr(signal, "setitimer", None)
    if alarm is not None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it does: no Python code has to run
    for line in open(0, closefd=False):
        number, seconds, *texts = json.loads(line)
        answer: bool | None = None
        if alarm is not None:
            alarm(signal.ITIMER_REAL, seconds)
        try:
            gold, target = (parse(_as_latex(text), parsing_timeout=None) for text in texts)
            if gold and target:
                answer = bool(verify(gold, target, timeout_seconds=None))
        except Exception:  # whatever a parser of free text may raise: the answer is not known
            answer = None
        if alarm is not None:
            alarm(signal.ITIMER_REAL, 0)
        print(json.dumps([number, answer]), flush=True)


def _as_latex(text: str) -> str:
    return text if "$" in text or r"\boxed" in text else f"${text}$"


if __name__ == "__main__":
    main()
