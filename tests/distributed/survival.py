"""Kill what a run of two processes is made of at random moments, go on, and compare with a run that nobody disturbed.

    python tests/distributed/survival.py --kills 20 --served --launch cpu_ddp.yaml cpu_zero2.yaml

Victims, in random order but equally often:

    rank        one of the ranks, SIGKILL
    launcher    SIGKILL
    preemption  SIGTERM to the launcher, as schedulers do
    server      with `--served`: the teacher's server, SIGKILL, started again on its port a moment later
    away        with `--served`: the same, but not started again until the run has given up

Moments: before the first step, while a checkpoint is being written, or any other. After `server` the run must go on by
itself; after all others no process may be left `PATIENCE` seconds later. Every checkpoint that looks complete must be
readable, none may be lost, and where the run could save (launcher, preemption, away) not even one step may be. Each run
is started again until it is done; then the loss of every step must be that of the undisturbed run, to the last bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[2]
PATIENCE = 150.0
WHOLE_RUN = 1200.0
STEPS = 60
VICTIMS = ("rank", "launcher", "preemption")
OF_A_SERVER = ("server", "away")
SAVES = ("launcher", "preemption", "away")  # after these the last finished step is kept
AWAY_PATIENCE = 10.0  # seconds that a run waits for a server which is not coming back
SETTINGS = {
    "method": "gkd",
    "lmbda": 0.5,
    "replay_buffer_size": 16,
    "max_steps": STEPS,
    "save_steps": 5,
    "save_total_limit": 2,
    "logging_steps": 1,
    "max_length": 24,
    "max_new_tokens": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "report_to": "none",
}
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def prepare(folder: Path) -> Path:
    """A recipe with tiny models and data on disk. Dropout is on, so that the random state must come back too."""
    from distill_trainers.toy import character_tokenizer, tiny_llama

    tokenizer = character_tokenizer()
    for name, width, seed, more in (("student", 32, 1, {"attention_dropout": 0.1}), ("teacher", 48, 2, {})):
        tiny_llama(tokenizer, width, 2, seed=seed, **more).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(20) for b in range(20)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = {"model_name_or_path": str(folder / "student"), "disable_dropout": False}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**SETTINGS, **models, "dataset": str(folder / "train.jsonl")}))
    return recipe


class Server:
    """The teacher behind HTTP, on one port for as long as the test lasts."""

    def __init__(self, model: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.address = model, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Returns once it serves."""
        command = [sys.executable, "-m", "distill_trainers.cli", "serve-teacher", "--model", str(self.model)]
        # Each row in a forward of its own: what else is asked at the time would change the last bits of an answer.
        command += ["--device", "cpu", "--port", str(self.port), "--batch-tokens", "1"]
        self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        assert "Serving teacher" in self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Launch:
    """One start of the run, and what it says."""

    def __init__(self, recipe: Path, output: Path, launch: str, resume: bool, *options: str):
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / launch)]
        command += ["--main_process_port", str(29500 + random.randrange(2000)), "-m", "distill_trainers.cli.train"]
        command += ["--config", str(recipe), "--output_dir", str(output), *options]
        command += ["--resume_from_checkpoint", "true"] if resume else []
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        self.process = subprocess.Popen(command, env=ENVIRONMENT, cwd=output.parent, **how)
        self.output, self.step = output, 0  # the last step that it told of
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.match(r"train step (\d+)/", line):
                self.step = int(found[1])

    @property
    def text(self) -> str:
        """Its errors, and the last that it said."""
        return "".join([*(line for line in self.lines if "error" in line.lower()), *self.lines[-40:]])

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def workers(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
            return [each for each in found if "distill_trainers.cli.train" in " ".join(each.cmdline())]
        return []

    def is_writing(self) -> bool:
        """Whether a checkpoint is begun and not yet complete."""
        return any(not (folder / "trainer_state.json").exists() for folder in self.output.glob("checkpoint-*"))

    def wait(self, workers: list[psutil.Process], patience: float = PATIENCE) -> float:
        """Seconds until no process is left; AssertionError if one still is after `patience`."""
        started = time.monotonic()
        while time.monotonic() - started < patience:
            if self.ended and not alive(workers):
                return time.monotonic() - started
            time.sleep(0.2)
        self.end(workers)
        raise AssertionError(f"Processes were left after {patience:.0f} s: {self.text}")

    def finish(self) -> None:
        """Let the run go on to its end."""
        self.wait([], WHOLE_RUN)
        assert self.process.returncode == 0, self.text

    def end(self, workers: list[psutil.Process]) -> None:
        for each in [self.process, *workers]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                each.kill()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def losses(output: Path) -> dict[int, float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def check_checkpoints(output: Path) -> int:
    """The newest complete checkpoint's step, or 0; all that look complete must be readable."""
    from safetensors import safe_open

    from distill_trainers.run_files import is_complete

    steps = [0]
    for folder in filter(is_complete, output.glob("checkpoint-*")):
        for file in folder.rglob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert list(opened.keys()), f"{file} is empty"
        steps.append(int(folder.name.split("-")[1]))
    return max(steps)


def wait_until(condition: Callable[[], bool], launch: Launch, seconds: float, pause: float) -> None:
    """Until something is so, the run has ended, or time is up."""
    end = time.monotonic() + seconds
    while not (condition() or launch.ended) and time.monotonic() < end:
        time.sleep(pause)


def wait_for_moment(launch: Launch, chance: random.Random) -> str:
    """Let the run go on up to a random moment, and say which kind it is."""
    moment, began = chance.choices(("start", "save", "any"), (1, 2, 3))[0], launch.step
    if moment == "start" and not began:
        wait_until(lambda: bool(launch.workers()), launch, PATIENCE, 0.05)
        time.sleep(chance.uniform(0, 20))
        return "start" if not launch.step else "any"
    wait_until(lambda: launch.step > began, launch, PATIENCE, 0.05)
    if moment == "save":
        wait_until(launch.is_writing, launch, 20, 0.001)
        time.sleep(chance.choice((0.0, 0.01, 0.03, 0.1)))
        return "save"
    more = chance.randrange(8)
    wait_until(lambda: launch.step > began + more, launch, PATIENCE, 0.05)
    time.sleep(chance.uniform(0, 0.5))
    return "any"


def strike(launch: Launch, victim: str, workers: list[psutil.Process], chance: random.Random, server: Server | None):
    """Kill; seconds until all had ended, or until the run had gone on by itself."""
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if victim == "rank":
            chance.choice(sorted(workers, key=lambda each: each.pid)).kill()
        elif victim == "launcher":
            launch.process.kill()
        elif victim == "preemption":
            launch.process.terminate()
    if victim not in OF_A_SERVER:
        return launch.wait(workers)
    assert server is not None
    server.kill()
    if victim == "away":
        seconds = launch.wait(workers)
        server.start()
        assert launch.process.returncode == 1 and "teacher's server" in "".join(launch.lines), launch.text
        return seconds
    began, before = time.monotonic(), launch.step
    time.sleep(chance.uniform(0, 5))
    server.start()
    wait_until(lambda: launch.step > before + 1, launch, PATIENCE, 0.05)  # one may have been told of since the kill
    assert launch.step > before, f"The run did not go on: {launch.text}"
    return time.monotonic() - began


class Deck:
    """Victims in random order, all equally often; `away` only for a launch that was started to wait briefly."""

    def __init__(self, victims: tuple[str, ...], chance: random.Random):
        self.victims, self.chance = victims, chance
        self.left: list[str] = []

    def next(self, *, waits: bool = False) -> str:
        """The next victim; not `away` for a run that `waits` for long."""
        if not set(self.left) - ({"away"} if waits else set()):
            self.left += self.chance.sample(self.victims, len(self.victims))
        victim = next(each for each in self.left if not (waits and each == "away"))
        self.left.remove(victim)
        return victim


def survive(folder: Path, launch: str, kills: int, seed: int, served: bool) -> None:
    """Runs that are disturbed `kills` times in all; each must end as the run that nobody disturbs."""
    chance, recipe = random.Random(seed), prepare(folder)
    server = Server(folder / "teacher") if served else None
    try:
        Trial(recipe, launch, server, chance, kills).run()
    finally:
        if server is not None:
            server.kill()


class Trial:
    """All runs of one launch configuration, and what was counted."""

    def __init__(self, recipe: Path, launch: str, server: Server | None, chance: random.Random, kills: int):
        self.recipe, self.launch, self.server, self.chance, self.kills = recipe, launch, server, chance, kills
        self.deck = Deck(VICTIMS + (OF_A_SERVER if server else ()), chance)
        self.counts, self.moments, self.longest = Counter[str](), Counter[str](), dict[str, float]()

    def start(self, output: Path, victim: str) -> Launch:
        teacher = self.server.address if self.server else str(self.recipe.parent / "teacher")
        options = ["--teacher_model_name_or_path", teacher]
        if self.server:
            options += ["--teacher_server_patience", str(AWAY_PATIENCE if victim == "away" else 2 * PATIENCE)]
        return Launch(self.recipe, output, self.launch, check_checkpoints(output) > 0, *options)

    def run(self) -> None:
        whole = self.recipe.parent / "undisturbed"
        first = self.start(whole, "nobody")
        first.finish()
        expected, runs = losses(whole), 0
        assert len(expected) == STEPS
        while self.counts.total() < self.kills:
            output = self.recipe.parent / f"run{runs}"
            while not self.ends(output):
                pass
            found, runs = losses(output), runs + 1
            differ = {step: (found.get(step), loss) for step, loss in expected.items() if found.get(step) != loss}
            assert found.keys() == expected.keys() and not differ, differ
            print(f"{self.launch}: run {runs} done, its {STEPS} losses are those of the undisturbed one", flush=True)
        counts = ", ".join(f"{name} {self.counts[name]} ({self.longest[name]:.0f} s)" for name in self.counts)
        print(f"{self.launch}: {self.counts.total()} kills, {runs} runs. Victims (longest time to end, or to go on):")
        print(f"  {counts}; moments: {dict(self.moments)}", flush=True)

    def ends(self, output: Path) -> bool:
        """Start the run and disturb it; whether it came to its end all the same."""
        start = check_checkpoints(output)
        victim = self.deck.next() if self.counts.total() < self.kills else "nobody"
        running = self.start(output, victim)
        while victim != "nobody":
            moment = wait_for_moment(running, self.chance)
            workers, step = running.workers(), running.step
            if running.ended or not workers:
                break
            seconds = strike(running, victim, workers, self.chance, self.server)
            reached = check_checkpoints(output)
            self.counts[victim] += 1
            self.moments[moment] += 1
            self.longest[victim] = max(seconds, self.longest.get(victim, 0.0))
            how = "went on" if victim == "server" else "all ended"
            told = f"{self.launch}: {victim} killed ({moment}, after step {step}), {how} {seconds:.1f} s later"
            print(f"{told}; checkpoint {start} -> {reached}", flush=True)
            assert reached >= max(start, step if victim in SAVES else 0), running.text
            if victim != "server":
                return False
            victim = self.deck.next(waits=True) if self.counts.total() < self.kills else "nobody"
        running.finish()
        assert check_checkpoints(output) == STEPS, running.text
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each launch (%(default)s)")
    parser.add_argument("--launch", nargs="+", default=["cpu_ddp.yaml"], help="of accelerate_configs/")
    parser.add_argument("--served", action="store_true", help="the teacher is behind HTTP, and a victim too")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for launch in options.launch:
        with tempfile.TemporaryDirectory() as folder:
            survive(Path(folder), launch, options.kills, options.seed, options.served)


if __name__ == "__main__":
    main()
