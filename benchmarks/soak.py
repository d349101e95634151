"""What grows while a run goes on: memory, descriptors, threads, files and objects, at minute two and at the end.

    python benchmarks/soak.py                                   # ten minutes on-policy with a served teacher
    python benchmarks/soak.py --what minillm --minutes 10 --out soak.json
    python benchmarks/soak.py --what gkd --turns 60             # so many steps instead: the same work on any machine

Each subject works in a process of its own; where its teacher is served, the server is another one, and both are looked
at. A turn is a step, an evaluation, a client, a comparison or a trainer. Memory is read every few seconds and never
tidied up before: `malloc_trim` is not called, and garbage is collected only where objects are counted, at the first
mark (minute two, or later where turns are slow) and at the end. Slopes are fitted to the means of ten equal stretches
after the first mark, so that their intervals (95 %, Student's t) are not narrowed by readings that follow one another.
What a run has in use is told by malloc; the heap around it also grows where pieces of other sizes are asked for.
`transformers` keeps every log of a run and writes all of them into each checkpoint, so memory grows with them; here a
run keeps its last 100 (`--logs`), so that what grows beside them is seen.
Linux alone tells all this.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from measuring import machine, write_results

EARLY = 120.0  # seconds until the first mark; a fifth of the time where that is shorter
WARM = 40  # turns that it waits for: evaluations and checkpoints have each been there by then
SECONDS = 2.0  # between two readings of memory
MEMORY = ("rss", "pss", "private", "anonymous")  # MiB
COUNTS = ("descriptors", "sockets", "threads", "children")
_STRETCHES, _T_8 = 10, 2.306  # Student's t at 97.5 % with 8 degrees of freedom
_SETTLED = 1.0  # MiB an hour: a slope whose interval ends below it is none


# ---- Looking --------------------------------------------------------------------------------------------------------


def look(pid: int) -> dict[str, float]:
    """Memory of a process in MiB, and counts of what it holds of the system."""
    names = {"Rss": "rss", "Pss": "pss", "Private_Clean": "private", "Private_Dirty": "private"}
    names |= {"Anonymous": "anonymous"}
    seen = dict.fromkeys((*MEMORY, *COUNTS), 0.0)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        if name in names:
            seen[names[name]] += int(value.split()[0]) / 1024
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            seen["sockets"] += os.readlink(descriptor).startswith("socket:")
            seen["descriptors"] += 1
    for task in Path(f"/proc/{pid}/task").iterdir():
        seen["threads"] += 1
        with contextlib.suppress(FileNotFoundError):
            seen["children"] += len((task / "children").read_text().split())
    return seen


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _names.split()]


def in_use() -> float:
    """MiB that malloc has given to this process and not got back: what the heap holds beside them is free to be used.

    Python's own small objects lie in pools beside malloc's; its blocks are counted at the marks.
    """
    read = ctypes.CDLL(None).mallinfo2
    read.restype = _Mallinfo
    told = read()
    return (told.uordblks + told.hblkhd) / 2**20


def files_in(folder: Path) -> int:
    return sum(len(files) + len(folders) for _, folders, files in os.walk(folder))


class Watch:
    """Reads both processes as turns go by; the subject calls `tick` after each of its turns."""

    def __init__(self, options: Any, folder: Path, server: int | None):
        self.options, self.folder = options, folder
        self.pids = {"run": os.getpid()} | ({} if server is None else {"server": server})
        self.turns = 0
        self.marks = 0
        self._started = self._read_at = 0.0  # the first turn starts the clock: models are loaded by then
        self._out = (folder / "readings.jsonl").open("w", buffering=1)

    def tick(self) -> bool:
        """Count a turn; True when it was the last."""
        now, options = time.monotonic(), self.options
        self._started = self._started or now
        self.turns += 1
        if options.turns:
            done, early = self.turns / options.turns, 1 / 3
        else:
            seconds = 60 * options.minutes
            done, early = (now - self._started) / seconds, min(EARLY / seconds, 0.2)
        if not self.marks and done >= early and (self.turns >= WARM or done >= 0.5):
            self._mark()
        elif self.marks and now - self._read_at >= SECONDS:
            self._read_at = now
            self._out.write(json.dumps(self._reading()) + "\n")
        if done >= 1:
            self._mark()
        return done >= 1

    def _reading(self) -> dict[str, Any]:
        seen = {name: look(pid) for name, pid in self.pids.items()}
        seen["run"]["in use"] = in_use()
        return {"seconds": time.monotonic() - self._started, "turns": self.turns, **seen}

    def _mark(self) -> None:
        mark = self._reading()
        out = self.folder / "out"
        mark["temporary files"] = files_in(self.folder / "tmp")
        mark["files of the run"] = files_in(out)
        gc.collect()
        mark["blocks"] = sys.getallocatedblocks()
        mark["objects"] = collections.Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())
        (self.folder / f"mark-{self.marks}.json").write_text(json.dumps(mark))  # kept here, its names would be counted
        self.marks += 1


# ---- Subjects -------------------------------------------------------------------------------------------------------


def trained(method: str, watch: Watch, address: str, **settings: Any) -> None:
    """A run with evaluation, checkpoints and logged completions now and then; a turn is an optimiser step."""
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if watch.options.logs:
                del state.log_history[: -watch.options.logs]
            control.should_training_stop |= watch.tick()

    trainer = make_trainer(method, watch, address, **settings)
    trainer.add_callback(Ticks())
    trainer.train()


def make_trainer(method: str, watch: Watch, teacher: Any, rows: int = 400, **settings: Any) -> Any:
    from distill_trainers.toy import addition_dataset, character_tokenizer, tiny_llama
    from distill_trainers.trainers import METHODS

    tokenizer, seed = character_tokenizer(), watch.options.seed
    data = addition_dataset(rows + 8, seed)
    prompts = settings.get("lmbda", 1) == 1
    config, trainer = METHODS[method]
    args = config(
        **{
            "output_dir": str(watch.folder / "out"),
            "overwrite_output_dir": True,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "seed": seed,
            "max_steps": 10**6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "max_length": 32,
            "max_new_tokens": 4,
            "logging_steps": 5,
            "eval_strategy": "steps",
            "eval_steps": 20,
            "eval_measures": ["diversity"],
            "eval_measures_rows": 4,
            "save_steps": 15,
            "save_total_limit": 2,
            "logging_nan_inf_filter": False,
            **settings,
        }
    )
    train = data.select(range(rows))
    return trainer(
        model=tiny_llama(tokenizer, 64, 2, seed=seed + 1),
        teacher_model=teacher,
        args=args,
        train_dataset=train.remove_columns("completion") if prompts else train,
        eval_dataset=data.select(range(rows, rows + 8)),
        processing_class=tokenizer,
    )


def gkd(watch: Watch, address: str) -> None:
    trained("gkd", watch, address, lmbda=1.0, rollout_engine="decode")


def minillm(watch: Watch, address: str) -> None:
    paper = {"num_minibatches": 2, "num_inner_epochs": 2, "teacher_mix_alpha": 0.0}
    trained("minillm", watch, address, teacher_server_kind="hidden", **paper)


def cached(watch: Watch, teacher: str) -> None:
    """Off-policy from a cache in many small shards, more than are mapped at once."""
    from distill_trainers.teachers.cache import shards

    shards.SHARD_BYTES = 2**14
    shards.TeacherCache.__init__.__defaults__ = (2**14,)
    trained("gkd", watch, teacher, lmbda=0.0, teacher_cache=str(watch.folder / "cache"))


def evaluation(watch: Watch, address: str) -> None:
    """A trainer that is given new rows to evaluate again and again."""
    from distill_trainers.toy import addition_dataset

    trainer = make_trainer("gkd", watch, address, rows=16, lmbda=1.0, eval_measures=None)
    for number in iter(int, 1):
        trainer.evaluate(addition_dataset(64, seed=watch.turns + number))
        if watch.tick():
            return


def clients(watch: Watch, address: str) -> None:
    """Clients that come, ask and go, some of them without a word; it is the server that matters."""
    import torch

    from distill_trainers.teachers import RemoteTeacher

    ids = torch.randint(2, 14, (4, 24), generator=torch.Generator().manual_seed(watch.options.seed))
    while True:
        teacher = RemoteTeacher(address)
        with teacher.asking_ahead():
            teacher.signal({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 1:] >= 0, None)
        if watch.turns % 2:
            teacher.signal({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 1:] >= 0, None)
        if watch.turns % 3:
            teacher.close()
        del teacher
        if watch.tick():
            return


def verifier(watch: Watch, _: str) -> None:
    """Comparisons of expressions, the verifier's own process included; each hundredth never ends by itself."""
    from distill_trainers.answers.symbolic import SymbolicEquality

    equal = SymbolicEquality(seconds=1.0)
    while True:
        number = watch.turns
        hostile = number % 100 == 99
        equal("9^{9^{9^{9}}}" if hostile else rf"\frac{{{number}}}{{{number + 1}}}+x_{{{number}}}", f"x_{{{number}}}")
        if equal._process is not None:
            watch.pids["server"] = equal._process.pid
        if watch.tick():
            equal.close()
            return


def trainers(watch: Watch, address: str) -> None:
    """Trainers that are made, take two steps with the served teacher, and are let go."""
    while True:
        settings = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", "eval_measures": None}
        trainer = make_trainer("gkd", watch, address, rows=32, lmbda=1.0, **settings)
        trainer.train()
        del trainer
        if watch.tick():
            return


SUBJECTS: dict[str, tuple[Callable[[Watch, str], None], str]] = {
    "gkd": (gkd, "served"),
    "minillm": (minillm, "served"),
    "cached": (cached, "local"),
    "evaluation": (evaluation, "served"),
    "clients": (clients, "served"),
    "verifier": (verifier, "none"),
    "trainers": (trainers, "served"),
}


# ---- Measuring ------------------------------------------------------------------------------------------------------


def measure(what: str, options: Any) -> dict[str, Any]:
    """Let the subject work in a process of its own; return both marks and the slopes between them."""
    kind = SUBJECTS[what][1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        os.environ |= {"TMPDIR": str(folder / "tmp"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        with teacher_of(kind, folder, options) as (address, pid):
            command = [sys.executable, __file__, *sys.argv[1:], "--work", what, name, address, str(pid or 0)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(options.threads)})
        early, late = (json.loads((folder / f"mark-{number}.json").read_text()) for number in range(2))
        readings = [json.loads(line) for line in (folder / "readings.jsonl").read_text().splitlines()]
    processes = [name for name in ("run", "server") if name in early and name in late]
    grown = {kind: late["objects"][kind] - early["objects"].get(kind, 0) for kind in late["objects"]}
    return {
        "early": {key: value for key, value in early.items() if key != "objects"},
        "late": {key: value for key, value in late.items() if key != "objects"},
        "objects": [sum(mark["objects"].values()) for mark in (early, late)],
        "objects_grown": dict(sorted(grown.items(), key=lambda item: -item[1])[:12]),
        "slopes": {name: {k: slope(readings, name, k) for k in early[name] if k not in COUNTS} for name in processes},
    }


@contextlib.contextmanager
def teacher_of(kind: str, folder: Path, options: Any) -> Iterator[tuple[str, int | None]]:
    from remote import server

    from distill_trainers.toy import character_tokenizer, tiny_llama

    if kind == "none":
        yield "", None
        return
    tokenizer = character_tokenizer()
    tiny_llama(tokenizer, 128, 4, seed=options.seed).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    if kind == "local":
        yield str(folder / "teacher"), None
        return
    with server(str(folder / "teacher"), options.threads) as (address, pid):
        yield address, pid


def slope(readings: list[dict[str, Any]], process: str, key: str) -> dict[str, float] | None:
    """MiB an hour and per 1000 turns, with the half width of an interval; None of too few readings."""
    points = [(reading["seconds"] / 3600, reading["turns"] / 1000, reading[process][key]) for reading in readings]
    if len(points) < 2 * _STRETCHES:
        return None
    size = len(points) / _STRETCHES
    parts = [points[int(i * size) : int((i + 1) * size)] for i in range(_STRETCHES)]
    means = [[statistics.fmean(column) for column in zip(*part, strict=True)] for part in parts]
    hours, turns, values = (list(column) for column in zip(*means, strict=True))
    fit = statistics.linear_regression(hours, values)
    spread = sum((h - statistics.fmean(hours)) ** 2 for h in hours)
    rest = sum((v - fit.intercept - fit.slope * h) ** 2 for h, v in zip(hours, values, strict=True))
    half = _T_8 * (rest / (_STRETCHES - 2) / spread) ** 0.5
    per_turn = statistics.linear_regression(turns, values).slope
    return {"mib_per_hour": fit.slope, "half_width": half, "mib_per_1000_turns": per_turn}


def table(what: str, result: dict[str, Any]) -> str:
    early, late = result["early"], result["late"]
    minutes = [mark["seconds"] / 60 for mark in (early, late)]
    lines = [f"**{what}**: {late['turns']:,} turns in {minutes[1]:.1f} minutes", ""]
    lines += [f"| | minute {minutes[0]:.1f} | the end | MiB an hour |", "|---|---|---|---|"]
    for name, slopes in result["slopes"].items():
        for key, fitted in slopes.items():
            rate = "" if fitted is None else f"{fitted['mib_per_hour']:+.1f} ± {fitted['half_width']:.1f}"
            lines.append(f"| {name}: {key} MiB | {early[name][key]:.1f} | {late[name][key]:.1f} | {rate} |")
        lines += [f"| {name}: {key} | {early[name][key]:.0f} | {late[name][key]:.0f} | |" for key in COUNTS]
    lines += [f"| {key} | {early[key]} | {late[key]} | |" for key in ("temporary files", "files of the run")]
    lines.append(f"| Python objects | {result['objects'][0]:,} | {result['objects'][1]:,} | |")
    lines.append(f"| Python's blocks of memory | {early['blocks']:,} | {late['blocks']:,} | |")
    grown = ", ".join(f"{kind} {count:+}" for kind, count in result["objects_grown"].items() if count > 0)
    return "\n".join([*lines, "", f"Objects: {grown or 'none more'}.", verdict(result), ""])


def verdict(result: dict[str, Any]) -> str:
    """In words: what is more at the end than at the first mark."""
    early, late, found = result["early"], result["late"], []
    for name, slopes in result["slopes"].items():
        found += [f"{name}: {key}" for key in COUNTS if late[name][key] > early[name][key]]
        for key in slopes.keys() & {"in use", "anonymous"}:
            fitted = slopes[key]
            if fitted and fitted["mib_per_hour"] - fitted["half_width"] > _SETTLED:
                found.append(f"{name}: {key} memory, {late[name][key] - early[name][key]:+.1f} MiB")
    found += ["temporary files"] * (late["temporary files"] > early["temporary files"])
    return f"Grows: {', '.join(found)}." if found else "Nothing grows."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=["gkd"], choices=SUBJECTS, help="what is looked at")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each")
    parser.add_argument("--turns", type=int, default=None, help="so many turns of each instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=int, default=100, help="that a run keeps; 0 keeps all, as transformers does")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    parser.add_argument("--out", type=Path, default=None, help="file for all numbers")
    parser.add_argument("--work", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        what, folder, address, pid = options.work
        SUBJECTS[what][0](Watch(options, Path(folder), int(pid) or None), address)
        return
    described = machine(options.threads)
    print(f"{described}\n", flush=True)
    results = {}
    for what in options.what:
        results[what] = measure(what, options)
        print(table(what, results[what]), flush=True)
    write_results(options.out, described, results)


if __name__ == "__main__":
    main()
