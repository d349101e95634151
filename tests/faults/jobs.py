"""The commands that faults are put into: tiny, and each with what must be the same at its end."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill_trainers.toy import RATIONALE_PROMPTS

HERE = Path(__file__).parent
# What no two runs have alike, and what is counted since the last start.
TIMES = re.compile(r".*(runtime|per_second|seconds|time).*|created|environment|cost|train_loss|total_flos|known|done")
TRAIN = {
    "max_steps": 8,
    "save_steps": 3,
    "save_total_limit": 2,
    "logging_steps": 1,
    "max_length": 24,
    "max_new_tokens": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "report_to": "none",
    "doctor": False,
    "disable_dropout": False,
}
PLAIN = re.compile(r"^error: .+", re.MULTILINE)


def steady(value: Any) -> Any:
    """JSON without times."""
    if isinstance(value, dict):
        return {name: steady(item) for name, item in value.items() if not TIMES.fullmatch(name)}
    return [steady(item) for item in value] if isinstance(value, list) else value


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def trained(work: Path) -> dict[str, Any]:
    """Weights, the loss and the other measures of every step, and the scores."""
    history = json.loads((work / "out" / "trainer_state.json").read_text())["log_history"]
    return {
        "weights": digest(work / "out" / "model.safetensors"),
        "steps": [row for row in steady(history) if "loss" in row or "eval_loss" in row],
        "scores": steady(json.loads((work / "out" / "metrics.json").read_text())),
    }


def cached(work: Path) -> dict[str, Any]:
    """The teacher's answers by row, whichever shard they are in."""
    from distill_trainers.teachers.cache.identity import read_identity
    from distill_trainers.teachers.cache.shards import TeacherCache, row_checksum

    cache = TeacherCache(work / "cache", read_identity(work / "cache").stamp())
    rows = {key.hex(): cache.read(key) for key in cache.keys()}  # noqa: SIM118
    return {key: row and row_checksum(bytes.fromhex(key), row) for key, row in rows.items()}


def texts(*names: str) -> Callable[[Path], dict[str, Any]]:
    return lambda work: {name: steady([*map(json.loads, (work / name).read_text().splitlines())]) for name in names}


def evaluated(work: Path) -> dict[str, Any]:
    return steady(json.loads((work / "out" / "evaluation.json").read_text()))


@dataclass
class Job:
    """A command.

    Attributes:
        argv: its words; `{work}` stands for its folder, `{shop}` for that of models and data.
        state: what must be the same at its end.
        settings: of its `--config` file.
        before: jobs whose outcome it starts from.
    """

    name: str
    argv: list[str]
    state: Callable[[Path], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0,)

    @property
    def trains(self) -> bool:
        return self.argv[0] == "train"


def _train(name: str, **settings: Any) -> Job:
    data = {"dataset": "{shop}/train.jsonl", "model_name_or_path": "{shop}/student"}
    settings = {**TRAIN, **data, "teacher_model_name_or_path": "{shop}/teacher", **settings}
    return Job(name, ["train", "--output_dir", "{work}/out"], trained, settings)


RATIONALES = {
    "questions": "{shop}/questions.jsonl",
    "teacher": "{shop}/teacher",
    "prompt_style": "text",
    "use_cpu": True,
    "samples": 2,
    "max_new_tokens": 6,
    "temperature": 1.0,
    "batch_size": 4,
    "folder": "{work}",
    "answer_formats": [r"regex:(\d+)"],
}
EVALUATE = {
    "students": {"after": "{shop}/student"},
    "teacher": "{shop}/teacher",
    "dataset": "{shop}/test.jsonl",
    "output_dir": "{work}/out",
    "metrics": ["perplexity", "agreement", "rouge_l", "diversity"],
    "seeds": [1, 2],
    "batch_size": 4,
    "max_length": 20,
    "max_new_tokens": 4,
    "bootstrap_samples": 20,
    "use_cpu": True,
}
PROMPTS = {"dataset": "{shop}/prompts.jsonl"}
ON_POLICY = {"lmbda": 0.5, "replay_buffer_size": 8}
INIT = {"model_name_or_path": None, "student_init": {"keep_layers": 1}}
CHAINS = {
    "method": "rationale",
    "objective": "dual_chain",  # samples chains of the student's own, which a stop must not change
    "dataset": "{shop}/chains.jsonl",
    "distill_weight": 0.5,
    "innovation_samples": 2,
    "max_length": 40,
    "max_new_tokens": 8,
    "eval_fraction": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,
    **RATIONALE_PROMPTS,
}
CACHE = {**TRAIN, "model_name_or_path": "{shop}/student", "teacher_model_name_or_path": "{shop}/teacher"}
CACHE |= {"dataset": "{shop}/train.jsonl", "lmbda": 0.0, "teacher_cache": "{work}/cache", "output_dir": "{work}/out"}
JOBS = [
    _train("off-policy", lmbda=0.0, eval_fraction=4, eval_strategy="steps", eval_steps=4, **INIT),
    _train("on-policy", **ON_POLICY),
    _train("minillm", method="minillm"),
    _train("dpkd", method="dpkd"),
    _train("rationale", **CHAINS),
    _train("seq_kd", lmbda=0.0, seq_kd=True, rollout_batch_size=4, **PROMPTS),
    Job("cache-teacher", ["cache-teacher"], cached, CACHE),
    Job("extract", ["rationales", "extract"], texts("responses.jsonl"), RATIONALES, codes=(0, 1)),
    Job("verify", ["rationales", "verify"], texts("verified.jsonl", "wrong.jsonl"), RATIONALES, before=("parsed",)),
    Job("evaluate", ["evaluate"], evaluated, EVALUATE),
    Job(
        "pairs",
        ["pairs", "--output_dir", "{work}/out"],
        texts("pairs.jsonl"),
        {**_train("", **PROMPTS).settings, "pairs_file": "{work}/pairs.jsonl", "rollout_batch_size": 4},
    ),
]
JOBS = {job.name: job for job in JOBS}


def make_shop(shop: Path) -> None:
    """Models and data of all jobs."""
    from distill_trainers.toy import addition_rationales, addition_rows, character_tokenizer, tiny_llama

    tokenizer = character_tokenizer()
    for name, width, seed, more in (
        ("student", 32, 1, {"attention_dropout": 0.1}),
        ("teacher", 48, 7, {"initializer_range": 0.25}),
    ):
        tiny_llama(tokenizer, width, 2, seed=seed, **more).save_pretrained(shop / name)
        tokenizer.save_pretrained(shop / name)
    rows = addition_rows(32, seed=5)
    parsed = [
        {"question": row["prompt"], "answer": row["completion"], "rationale": row["prompt"] + row["completion"]}
        | {"parsed_answer": row["completion"] if i % 3 else "1"}
        for i, row in enumerate(rows)
    ]
    files = {
        "train": rows,
        "test": rows[:10],
        "prompts": [{"prompt": row["prompt"]} for row in rows],
        "questions": [{"question": row["prompt"], "answer": row["completion"]} for row in rows],
        "parsed": parsed,
        "chains": addition_rationales(32, seed=5),
    }
    for name, lines in files.items():
        (shop / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@dataclass
class Done:
    """What came of one start: its exit status, what it said, and how many events it had."""

    code: int
    text: str
    seconds: float
    events: int
    late: bool
    log: Path

    @property
    def plain(self) -> bool:
        """Whether it says what is wrong in one sentence of ours, and nothing that only a programmer reads."""
        return self.code in (1, 2) and bool(PLAIN.search(self.text)) and "Traceback" not in self.text

    @property
    def error(self) -> str:
        found = PLAIN.search(self.text)
        return found[0] if found else self.text[-1500:]


class Lab:
    """Starts jobs, disturbed or not, from one process that has imported everything.

    Args:
        light: it has imported nothing, which is quicker for a few starts of a job that needs little.
    """

    def __init__(self, root: Path, environment: dict[str, str], light: bool = False):
        self.shop, self.root, self.number = root / "shop", root, 0
        self.shop.mkdir()
        make_shop(self.shop)
        command = [sys.executable, str(HERE / "zygote.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.references: dict[str, tuple[dict[str, Any], int, float]] = {}
        self.folders: dict[str, Path] = {}
        if not light:
            self._import()

    def _ask(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def _import(self) -> None:
        names = ["distill_trainers.cli.train", "distill_trainers.cli.pairs", "distill_trainers.cli.evaluate"]
        names += ["distill_trainers.cli.rationales", "distill_trainers.cli.cache_teacher", "datasets", "peft"]
        self._ask(**{"import": names})
        work = self.new("on-policy")
        told = self._ask(**self._request(JOBS["on-policy"], work), modules=True)
        self._ask(**{"import": told["modules"]})

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def new(self, name: str) -> Path:
        """A folder for a job to work in, with what it starts from."""
        self.number += 1
        work = self.root / f"{name}-{self.number}" / "work"
        work.mkdir(parents=True)
        for file in JOBS[name].before:
            shutil.copy(self.shop / f"{file}.jsonl", work)
        return work

    def copy(self, work: Path) -> Path:
        """The same folder once more, with the times of its files."""
        self.number += 1
        target = self.root / f"copy-{self.number}" / "work"
        shutil.copytree(work, target, copy_function=shutil.copy2)
        return target

    def _request(self, job: Job, work: Path, *options: str, **more: Any) -> dict[str, Any]:
        def put(value: Any) -> Any:
            if isinstance(value, str):
                return value.replace("{work}", str(work)).replace("{shop}", str(self.shop))
            if isinstance(value, dict):
                return {key: put(item) for key, item in value.items()}
            return value

        config = work.parent / "config.yaml"
        config.write_text(yaml.safe_dump({k: put(v) for k, v in job.settings.items() if v is not None}))
        argv = [*map(put, job.argv), "--config", str(config), *options]
        if argv[0] == "rationales":
            argv = [*argv[:2], "--config", str(config), *options]
        return {"argv": argv, "cwd": str(work.parent), "log": str(work.parent / "log"), **more}

    def run(self, name: str, work: Path, *options: str, fault: dict[str, Any] | None = None, limit=120.0) -> Done:
        """Start a job once."""
        job, log = JOBS[name], work.parent / "log"
        log.unlink(missing_ok=True)
        fault = {"folder": str(work), **(fault or {})}
        told = self._ask(**self._request(job, work, *options, fault=fault, limit=limit))
        text = log.read_text(errors="replace") if log.exists() else ""
        return Done(told["code"], text, told["seconds"], told.get("events", 0), told["late"], log)

    def again(self, name: str, work: Path, *options: str, **more: Any) -> Done:
        """Start the same job once more, as its user would: a run goes on where it has checkpoints."""
        from distill_trainers.run_files import find_last_complete_checkpoint

        if JOBS[name].trains and find_last_complete_checkpoint(work / "out"):
            options = ("--resume_from_checkpoint", "true", *options)
        return self.run(name, work, *options, **more)

    def reference(self, name: str) -> tuple[dict[str, Any], int, float]:
        """The state at the end of an undisturbed run, its events, and its seconds."""
        if name not in self.references:
            work = self.new(name)
            done = self.run(name, work)
            assert done.code in JOBS[name].codes and "Traceback" not in done.text, done.text[-3000:]
            self.references[name] = JOBS[name].state(work), done.events, done.seconds
            self.folders[name] = work
        return self.references[name]

    def finished(self, name: str) -> Path:
        """A copy of the folder of the undisturbed run."""
        self.reference(name)
        return self.copy(self.folders[name])

    def same(self, name: str, work: Path) -> bool:
        return JOBS[name].state(work) == self.reference(name)[0]

    def codes(self, name: str) -> tuple[int, ...]:
        """Exit statuses of a job that is done."""
        return JOBS[name].codes

    def difference(self, name: str, work: Path) -> str:
        """Where the state differs, in a few words."""
        now, then = JOBS[name].state(work), self.reference(name)[0]
        return "; ".join(
            f"{key}: {str(then.get(key))[:300]} -> {str(now.get(key))[:300]}"
            for key in then.keys() | now.keys()
            if then.get(key) != now.get(key)
        )[:1500]

    def forget(self, work: Path) -> None:
        """Remove a folder that is not needed any more."""
        shutil.rmtree(work.parent, ignore_errors=True)
