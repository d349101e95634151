"""What all benchmarks share: processes that take turns, time and peak memory of one process, the machine's name."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

Run = dict[str, float]


def in_turns(
    script: str,
    names: Sequence[str],
    rounds: int,
    more: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> dict[str, list[Run]]:
    """Results of `script --only NAME`, by name: each measurement is a process of its own, so that its peak memory is
    that of one contender, and they take turns, so that whatever else runs on the machine meets them alike.

    Args:
        script: prints one JSON object as its last line; it is given this process's own arguments, too.
        names: the contenders; each round starts with another one.
        more: further arguments behind the name.
    """
    results: dict[str, list[Run]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            command = [sys.executable, script, *sys.argv[1:], "--only", name, *more]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(environment or {}))
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print("  ", *more, f"{name}: {results[name][-1]}", file=sys.stderr, flush=True)
    return results


def medians(results: Mapping[str, Sequence[Run]]) -> dict[str, Run]:
    """Of every figure, over the processes."""
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }


def keep_settings(options: argparse.Namespace) -> None:
    """Record what a `--work` is made with; more seeds and contenders may come, anything else needs another folder."""
    free = {"work", "json", "plot", "only", "seeds", "contenders"}
    told = {name: value for name, value in sorted(vars(options).items()) if name not in free}
    now, file = json.loads(json.dumps(told, default=str)), options.work / "settings.json"
    then = json.loads(file.read_text()) if file.is_file() else now
    changed = [f"{name} was {then[name]}, is {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        raise SystemExit(f"{options.work} holds results of other settings: {', '.join(changed)}. Name another --work.")
    options.work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(then, indent=2) + "\n")


def write_results(path: Path | None, described: str, results: Mapping[str, object]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": described, "results": results}, indent=2) + "\n")


class Meter:
    """Memory above what is held when it is made: of this process, or of the GPU where `device` is one."""

    def __init__(self, device: str = "cpu"):
        self.on_gpu = device.startswith("cuda")
        self.held = self._held()

    def _held(self) -> float:
        if not self.on_gpu:
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20

    def extra_mib(self) -> float:
        """The highest so far."""
        if not self.on_gpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - self.held
        import torch

        return torch.cuda.max_memory_allocated() / 2**20 - self.held

    def now(self) -> tuple[float, float]:
        """Seconds on the clock and of this process, once the device is done with what it was given."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def machine(threads: int, device: str = "cpu") -> str:
    import torch
    import transformers
    import trl

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    chip = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    if device.startswith("cuda"):
        chip = f"{torch.cuda.get_device_name()}, {chip}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return (
        f"{platform.system()} {platform.machine()}, {chip}, {os.cpu_count()} cores, {threads} thread(s),\n"
        f"Python {platform.python_version()}, {versions}; load average at the start {load}."
    )
