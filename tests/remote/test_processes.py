"""Servers and trainers as processes: signals, kills, and two ranks that ask one server."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from transformers import TrainerCallback

from distill_trainers.toy import tiny_llama

ROOT = Path(__file__).parents[2]


class Process:
    """`distill-trainers serve-teacher` in a process of its own."""

    def __init__(self, folder, port=0, *options):
        command = [sys.executable, "-m", "distill_trainers.cli", "serve-teacher", "--model", folder, "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *options], stdout=subprocess.PIPE, text=True, env=environment
        )

    def url(self):
        line = self.process.stdout.readline()
        assert line.startswith("Serving teacher at http://127.0.0.1:"), line
        return line.split()[-1]

    def end(self, number):
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


@pytest.fixture
def processes():
    """`processes(folder, port)` starts a server; whatever is left of it at the end is killed."""
    started = []

    def start(*args):
        started.append(Process(*args))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        with contextlib.suppress(ValueError):
            each.process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_cleanly(saved, processes, number):
    server = processes(saved.teacher)
    url = server.url()
    with urllib.request.urlopen(f"{url}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    assert server.end(number) == (0, "Stopped.\n")
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/health")


@pytest.mark.slow
def test_two_servers_do_not_share_a_port(saved, processes):
    port = processes(saved.teacher).url().rsplit(":", 1)[1]
    second = processes(saved.teacher, port)
    assert second.process.wait(60) == 2


class KillAndRestart(TrainerCallback):
    """Kills the server at the beginning of some steps, in the middle of its answers, and starts it again."""

    def __init__(self, server, start, steps):
        self.server, self.start, self.steps, self.kills = server, start, steps, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.server.process.kill()
            self.server.process.wait()
            self.kills += 1
            threading.Timer(0.5, self._restart).start()

    def _restart(self):
        self.server = self.start()


@pytest.mark.slow
def test_a_server_killed_and_restarted_changes_nothing(make_trainer, saved, processes, by_step):
    """kill -9 twice in a run; the restart takes as long as a process takes."""
    run = {"lmbda": 0.5, "max_steps": 6, "gradient_accumulation_steps": 2}
    whole = make_trainer(teacher=saved.teacher, **run)
    whole.train()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = processes(saved.teacher, port)
    keeper = KillAndRestart(server, lambda: processes(saved.teacher, port), (2, 4))
    trainer = make_trainer(teacher=server.url(), callbacks=[keeper], **run)
    trainer.train()
    assert keeper.kills == 2 and by_step(trainer) == pytest.approx(by_step(whole), rel=1e-5)
    trainer.teacher.close()


@pytest.mark.slow
def test_a_server_that_is_stopped_in_its_tracks_is_left_for_another(make_trainer, saved, processes, by_step):
    """SIGSTOP: connections are taken and nothing is said; the time-out finds it out."""
    run = {"lmbda": 0.0, "max_steps": 4, "gradient_accumulation_steps": 2}
    whole = make_trainer(teacher=saved.teacher, **run)
    whole.train()
    servers = [processes(saved.teacher) for _ in range(2)]
    urls = ",".join(server.url() for server in servers)

    class Freeze(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                servers[0].process.send_signal(signal.SIGSTOP)

    trainer = make_trainer(teacher=urls, callbacks=[Freeze()], teacher_server_timeout=2.0, **run)
    start = time.monotonic()
    trainer.train()
    assert by_step(trainer) == pytest.approx(by_step(whole), rel=1e-5) and time.monotonic() - start < 60
    trainer.teacher.close()


@pytest.fixture(scope="module")
def shared():
    """What runs two processes, beside the tests of all launches."""
    spec = importlib.util.spec_from_file_location("processes", ROOT / "tests/distributed/test_processes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def served(serve, tokenizer):
    """The worker's teacher behind HTTP; each row in a forward of its own, which nothing else can change the bits of."""
    teacher = tiny_llama(tokenizer, 64, 2, seed=0, tie_word_embeddings=False, intermediate_size=128)
    return serve(teacher, batch_tokens=1)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_ask_one_server(tmp_path, served, shared):
    """Each for its own rows; the student is that of one process with a local teacher."""
    settings = {**shared.SETTINGS, "lmbda": 0.5, "gradient_accumulation_steps": 2}
    one = shared.launch(tmp_path / "one", None, {**settings, "per_device_train_batch_size": 4})
    more = {"teacher": served.url}
    two = shared.launch(tmp_path / "two", "cpu_ddp.yaml", {**settings, "per_device_train_batch_size": 2}, **more)
    shared.assert_same_run(one, two, tmp_path / "one", tmp_path / "two")
    assert served.service.counted["questions"] >= 4 * 2 * 2


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "config"),
    [("replay", "cpu_zero3.yaml"), ("cycle", "cpu_fsdp2.yaml")],
)
def test_two_ranks_end_together_when_one_loses_its_teacher(tmp_path, served, shared, config, kind):
    """They keep the last finished step, which no checkpoint was due for, and go on from it exactly."""
    how = {"interruption": {"loses_teacher": 4}, "changes": {"teacher_server_patience": 1.0}, "teacher": served.url}
    said = shared.assert_goes_on(tmp_path, config, kind, **how, first=5)
    assert said.count("Its last step is kept in") == 2 and said.count("gave another process no answer") == 1
