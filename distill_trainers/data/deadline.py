"""A deadline for chat templates, which are programs of whoever wrote the tokenizer."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from distill_trainers.exceptions import DatasetError

SECONDS = 20.0  # for one conversation, which takes milliseconds


class EndlessTemplateError(DatasetError):
    """A chat template did not come to an end. No other form of the messages is tried."""


@contextlib.contextmanager
def rendering_deadline(tokenizer_name: str) -> Iterator[None]:
    """Let a template run for so many seconds alone.

    transformers' sandbox bounds a `range`, but not loops within loops. Python runs a signal's handler between two
    steps of a loop, and even within a long power, but in the main thread only, as are the workers of `datasets` and of
    data loaders in their processes. In another thread, and on Windows, there is no deadline.

    Raises:
        EndlessTemplateError: they were not enough.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_: Any) -> NoReturn:
        raise EndlessTemplateError(
            f"The chat template of {tokenizer_name!r} did not render one conversation within {SECONDS:g} s; expected "
            "milliseconds. Set another one (`tokenizer.chat_template`), or take another tokenizer."
        )

    handler = signal.signal(signal.SIGALRM, late)
    left, interval = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)  # another's timer, which had to wait
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
