"""Kill a run of two processes at random moments, start it again, and compare it with one that nobody killed.

    python tests/distributed/survival.py --kills 20 --launch cpu_ddp.yaml cpu_zero2.yaml

Killed are one of the ranks, or the launcher, with SIGKILL; or the launcher is asked to end with SIGTERM. After each no
process may be left after `PATIENCE` seconds, every checkpoint that looks complete must be readable, and the run goes
on from the newest. In the end the loss of every step must be that of the run which nobody killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[2]
PATIENCE = 150.0
STEPS = 300
VICTIMS = ("rank", "launcher", "preemption")
SETTINGS = {
    "method": "gkd",
    "lmbda": 0.5,
    "replay_buffer_size": 16,
    "max_steps": STEPS,
    "save_steps": 10,
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


def prepare(folder: Path) -> Path:
    """A recipe with tiny models and data on disk."""
    from distill_trainers.data.addition import character_tokenizer, tiny_llama

    tokenizer = character_tokenizer()
    for name, width, seed in (("student", 32, 1), ("teacher", 48, 2)):
        tiny_llama(tokenizer, width, 2, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(20) for b in range(20)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = {"model_name_or_path": str(folder / "student"), "teacher_model_name_or_path": str(folder / "teacher")}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**SETTINGS, **models, "dataset": str(folder / "train.jsonl")}))
    return recipe


class Launch:
    """One start of the run, and what it says."""

    def __init__(self, recipe: Path, output: Path, launch: str, resume: bool):
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / launch)]
        command += ["--main_process_port", str(29500 + random.randrange(2000)), "-m", "distill_trainers.cli.train"]
        command += ["--config", str(recipe), "--output_dir", str(output)]
        command += ["--resume_from_checkpoint", "true"] if resume else []
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        self.process = subprocess.Popen(command, env=environment, cwd=output.parent, **how)
        self.lines: list[str] = []
        self.trains = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if "train step" in line:
                self.trains.set()

    def workers(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
            return [each for each in found if "distill_trainers.cli.train" in " ".join(each.cmdline())]
        return []

    def wait(self, workers: list[psutil.Process]) -> float:
        """Seconds until no process is left; AssertionError if one still is after `PATIENCE`."""
        started = time.monotonic()
        while time.monotonic() - started < PATIENCE:
            gone = self.process.poll() is not None
            if gone and not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in alive(workers)):
                return time.monotonic() - started
            time.sleep(0.2)
        self.end(workers)
        raise AssertionError(f"Processes were left after {PATIENCE:.0f} s: {''.join(self.lines[-30:])}")

    def end(self, workers: list[psutil.Process]) -> None:
        for each in [self.process, *workers]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                each.kill()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def losses(output: Path) -> dict[int, float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def check_checkpoints(output: Path) -> int:
    """The newest complete checkpoint's step, or 0; all that look complete must be readable."""
    from safetensors import safe_open

    from distill_trainers.trainers.checkpoints import is_complete

    steps = [0]
    for folder in filter(is_complete, output.glob("checkpoint-*")):
        for file in folder.rglob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert list(opened.keys()), f"{file} is empty"
        steps.append(int(folder.name.split("-")[1]))
    return max(steps)


def strike(launch: Launch, victim: str, chance: random.Random) -> tuple[str, float]:
    """Kill at a random moment; what was killed (or that the run ended before), and seconds until all had ended."""
    while launch.process.poll() is None and not launch.trains.wait(0.2):
        if chance.random() < 0.004:
            break  # some die before the first step
    time.sleep(chance.uniform(0, 8))
    workers = launch.workers()
    if launch.process.poll() is not None or not workers:
        return "nobody", launch.wait(workers)
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if victim == "rank":
            chance.choice(sorted(workers, key=lambda each: each.pid)).kill()
        elif victim == "launcher":
            launch.process.kill()
        else:
            launch.process.terminate()
    return victim, launch.wait(workers)


def survive(folder: Path, launch: str, kills: int, seed: int) -> dict[str, int]:
    """Runs that are killed `kills` times in all; each must end as the run that nobody kills."""
    chance, recipe = random.Random(seed), prepare(folder)
    first = Launch(recipe, folder / "undisturbed", launch, resume=False)
    first.wait([])
    assert first.process.returncode == 0, "".join(first.lines[-40:])
    expected = losses(folder / "undisturbed")
    assert len(expected) == STEPS
    counts = dict.fromkeys((*VICTIMS, "runs"), 0)
    while sum(counts[victim] for victim in VICTIMS) < kills:
        output = folder / f"run{counts['runs']}"
        done = False
        while not done:
            start = check_checkpoints(output)
            running = Launch(recipe, output, launch, resume=start > 0)
            if sum(counts[victim] for victim in VICTIMS) < kills:
                victim, seconds = strike(running, VICTIMS[chance.randrange(3)], chance)
            else:
                victim, seconds = "nobody", running.wait(running.workers())
            if victim != "nobody":
                counts[victim] += 1
            reached = check_checkpoints(output)
            assert reached >= start, "a good checkpoint was lost"
            print(
                f"{launch}: {victim} killed, all ended {seconds:.1f} s later; checkpoint {start} -> {reached}",
                flush=True,
            )
            done = (output / "metrics.json").exists() and reached >= STEPS
            if victim == "nobody":
                assert done, "".join(running.lines[-40:])
        found = losses(output)
        assert found == expected, {
            step: (found.get(step), loss) for step, loss in expected.items() if found.get(step) != loss
        }
        counts["runs"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--launch", nargs="+", default=["cpu_ddp.yaml"], help="of accelerate_configs/")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for launch in options.launch:
        with tempfile.TemporaryDirectory() as folder:
            print(launch, survive(Path(folder), launch, options.kills, options.seed), flush=True)


if __name__ == "__main__":
    main()
