"""Ctrl-C on a real run, from outside: it saves a checkpoint that a second run goes on from."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml


@pytest.mark.slow
def test_interrupt_saves_and_resume_continues(tmp_path, saved):
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{a}+3=", "completion": str(a + 3)}) for a in range(64)))
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": saved.student,
        "teacher_model_name_or_path": saved.teacher,
        "dataset": str(data),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2000,
        "max_length": 24,
        "max_new_tokens": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
    }
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-u", "-m", "distill_trainers.cli.train", "--config", str(recipe)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "train step 3/" in line:
            process.send_signal(signal.SIGINT)
        if len(lines) > 400:
            break
    assert process.wait(timeout=120) == 0, "".join(lines[-30:])
    assert "Go on with" in "".join(lines)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 3 <= step < 2000
    again = subprocess.run(
        [*command, "--resume_from_checkpoint", "true", "--max_steps", str(step + 2)],
        capture_output=True,
        text=True,
        env=env,
        timeout=240,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"train step {step + 1}/" in again.stdout and f"train step {step}/" not in again.stdout


WORKER = """
import pathlib, signal, sys, time
from distill_trainers.cli.orphans import end_with_launcher

def saved(*args):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(0)

signal.signal(signal.SIGTERM, saved)
end_with_launcher()
print("ready", flush=True)
time.sleep(30)
"""
LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE, text=True).stdout.readline()
"""


@pytest.mark.parametrize("world, ends", [("2", True), ("1", False)])
def test_one_of_several_processes_ends_when_its_launcher_is_gone(tmp_path, world, ends):
    """Its launcher ends as soon as it is ready; a process alone may have been sent to the background."""
    saved = tmp_path / "saved"
    env = {**os.environ, "WORLD_SIZE": world, "LOCAL_RANK": "0"}
    subprocess.run([sys.executable, "-c", LAUNCHER, WORKER, str(saved)], env=env, check=True, timeout=60)
    until = time.monotonic() + (30 if ends else 3)
    while not saved.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert saved.exists() == ends


@pytest.mark.parametrize("torchs, ends", [(True, True), (False, False)])
def test_a_process_whose_launcher_went_before_it_could_look_ends_too(tmp_path, torchs, ends):
    """Its parent is not Python, as torch's launcher is; other launchers may be anything."""
    saved = tmp_path / "saved"
    env = {**os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | ({"TORCHELASTIC_RUN_ID": "none"} if torchs else {})
    command = ["sh", "-c", '"$0" -c "$1" "$2"; true', sys.executable, WORKER, str(saved)]
    parent = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + (30 if ends else 3)
        while not saved.exists() and time.monotonic() < until:
            time.sleep(0.1)
        assert saved.exists() == ends
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
