"""One run, one folder: what a lock holds, when it is free, and what the second run is told."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from distill_trainers import locks
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.locks import holding

HOLD = """
import os, sys, time
from pathlib import Path
from distill_trainers.locks import holding
folder = Path(sys.argv[1])
with holding(folder):
    if sys.argv[2] == "forks" and os.fork() == 0:  # as the workers of a data loader are
        time.sleep(60)
        os._exit(0)
    (folder / "holds").touch()
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """`owner("alone")`: another process that holds `tmp_path / "out"`; with "forks", a child of it lives on."""
    started = []

    def start(kind="alone"):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "out"), kind]
        started.append(subprocess.Popen(command, start_new_session=True))
        while not (tmp_path / "out" / "holds").exists():
            assert started[-1].poll() is None
            time.sleep(0.01)
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_second_is_told_who_is_there_and_what_to_do(owner, tmp_path):
    process = owner()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(ConfigurationError) as caught, holding(tmp_path / "link"):
        pass
    said = str(caught.value)
    assert f"{str(tmp_path / 'out')!r} is being written by process {process.pid} on {socket.gethostname()}" in said
    assert f", since {time.strftime('%Y')}-" in said and f"`kill {process.pid}`" in said
    assert "set another `output_dir`" in said


@pytest.mark.parametrize("kind", ["alone", "forks"])
def test_a_killed_owner_leaves_it_free_whatever_children_live_on(owner, tmp_path, kind):
    process = owner(kind)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out" / ".lock.json").exists(), "it had no time to tidy up"
    started = time.monotonic()
    with holding(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / ".lock.json").read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < locks._PATIENCE
    if kind == "forks":
        os.killpg(process.pid, 0)  # the child is there still


def test_the_same_process_may_hold_it_again_and_leaves_nothing(tmp_path):
    folder = tmp_path / "runs" / "out"
    with holding(folder):
        with pytest.raises(KeyError), holding(folder):
            raise KeyError
        assert (folder / ".lock").exists(), "the outer one goes on"
    assert not list(tmp_path.iterdir()), "an empty folder that was made for it is gone"
    with holding(folder):
        (folder / "kept").touch()
    assert [file.name for file in folder.iterdir()] == ["kept"]


def test_a_forked_child_neither_holds_nor_lets_go(tmp_path):
    with holding(tmp_path):
        child = os.fork()
        if child == 0:
            try:
                with holding(tmp_path):
                    os._exit(1)
            except ConfigurationError:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    outer = holding(tmp_path)
    outer.__enter__()
    child = os.fork()
    if child == 0:
        outer.__exit__(None, None, None)  # what an error in a child comes to
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock.json").exists()
    outer.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_of_two_that_start_together_one_wins(tmp_path):
    code = """
import sys
from distill_trainers import locks
locks._PATIENCE = 0.1
while folder := sys.stdin.readline().strip():
    try:
        with locks.holding(folder):
            print("won", flush=True)
            sys.stdin.readline()
    except ValueError as error:
        print("refused" if "is being written by" in str(error) else error, flush=True)
        sys.stdin.readline()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    racers = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    ends = []
    for number in range(20):
        for racer in racers:
            racer.stdin.write(f"{tmp_path / str(number % 2)}\n")
        ends.append(sorted(racer.stdout.readline().strip() for racer in racers))
        for racer in racers:
            racer.stdin.write("\n")
    for racer in racers:
        racer.stdin.close()
        racer.wait()
    assert ends == [["refused", "won"]] * 20
    assert not list(tmp_path.glob("*/*"))


def test_a_number_that_another_process_has_by_now_is_not_the_owner(tmp_path):
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": 1.0, "since": "then"}
    assert not locks._is_alive(mine)
    (tmp_path / ".lock.json").write_text(json.dumps(mine))
    with holding(tmp_path):
        pass


@pytest.mark.parametrize("left", ["", "{", "[]", "null", '{"host": 3}'])
def test_a_damaged_note_stops_nobody(tmp_path, left, monkeypatch):
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.1)
    (tmp_path / ".lock.json").write_text(left)
    with holding(tmp_path):
        pass


@pytest.mark.parametrize("beats", [True, False])
def test_another_machine_is_believed_as_long_as_it_shows_signs_of_life(tmp_path, monkeypatch, beats):
    """Where the kernel's lock does not reach: a note of another host, whose lock is free here."""
    monkeypatch.setattr(locks, "WATCH_SECONDS", 2.0)
    note = tmp_path / ".lock.json"
    note.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": 1.0, "since": "noon"}))
    code = "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(.3)"
    beating = subprocess.Popen([sys.executable, "-c", code if beats else "", str(note)])
    try:
        if beats:
            with pytest.raises(ConfigurationError, match="process 7 on elsewhere, since noon"), holding(tmp_path):
                pass
            assert json.loads(note.read_text())["pid"] == 7
        else:
            with holding(tmp_path):
                assert json.loads(note.read_text())["pid"] == os.getpid()
    finally:
        beating.kill()
        beating.wait()


def test_an_owner_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    with holding(tmp_path):
        before = (tmp_path / ".lock.json").stat().st_mtime_ns
        end = time.monotonic() + 10
        while (tmp_path / ".lock.json").stat().st_mtime_ns == before:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING), holding(tmp_path):
        pass
    assert "cannot be locked ([Errno 37] No locks available): see to it that no other run" in caplog.text


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    for place in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(ConfigurationError, match="which (is a file|cannot be made).*another `folder`"):
            with holding(place, "folder"):
                pass


# ---- Trainers and commands ------------------------------------------------------------------------------------------


def test_train_is_refused_in_a_folder_in_use_and_leaves_it_alone(owner, make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    process = owner()
    with pytest.raises(ConfigurationError, match=f"is being written by process {process.pid} "):
        trainer.train()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {".lock", ".lock.json", "holds"}
    with pytest.raises(ConfigurationError, match="is being written by"):
        trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    trainer.train()


def test_a_trainer_holds_its_folder_while_it_trains_and_lets_go_after_an_error(make_trainer, tmp_path):
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            assert (tmp_path / "out" / ".lock.json").exists()
            raise RuntimeError("on the way")

    first, second = make_trainer(callbacks=[Look()]), make_trainer(max_steps=1)
    with pytest.raises(RuntimeError, match="on the way"):
        first.train()
    assert not list((tmp_path / "out").glob(".lock*"))
    second.train()
    with holding(tmp_path / "out"):
        make_trainer(max_steps=1).train()
        second.save_model()
    assert not list((tmp_path / "out").glob(".*"))
