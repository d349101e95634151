"""Teachers behind real HTTP on loopback."""

from __future__ import annotations

import contextlib
import gc
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from distill_trainers.teachers import LocalTeacher
from distill_trainers.teachers.remote.http import bind, build_server
from distill_trainers.teachers.remote.service import Limits, TeacherService


class Served:
    """A server in a thread of this process; `url` is where it is, `service` what answers."""

    def __init__(self, model, tokenizer, token=None, port=0, **limits):
        self.service = TeacherService(LocalTeacher(model), tokenizer, "tiny", Limits(**limits))
        self.socket = bind("127.0.0.1", port)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = build_server(self.service, token)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        _wait_until(lambda: self.server.started)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def _wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def wait_until():
    """`wait_until(condition)` gives a condition 20 s to come about."""
    return _wait_until


@pytest.fixture
def serve(make_teacher, tokenizer):
    """`serve(model=…, token=…, **limits)` starts a server of the tiny teacher."""
    with contextlib.ExitStack() as stack:

        def start(model=None, tok=tokenizer, **settings):
            served = Served(model if model is not None else make_teacher(), tok, **settings)
            stack.callback(served.stop)
            return served

        yield start
    gc.collect()  # clients end with their teachers
