"""One step of every method under every launch and placement of the teacher: are loss and gradient the same?

    python benchmarks/parity.py                         # two CPU processes with gloo; writes the table to the screen
    python benchmarks/parity.py --gpu                   # the same on two GPUs (accelerate_configs without `cpu_`)
    python benchmarks/parity.py --launches ddp zero3 --teachers replicated zero3 --methods gkd --json parity.json

Tiny float32 models, plain SGD, greedy rollouts, so that nothing depends on which process has a row. Each cell is the
largest relative difference, over two optimiser steps, of the loss and of the norm of the student's gradient to a single
process with a whole teacher: the second step has the first one's gradient in its weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import machine

ROOT = Path(__file__).parents[1]
ROWS, STEPS = 8, 2
# Name of a launch: its file in accelerate_configs, and what the table calls it.
LAUNCHES: dict[str, tuple[str | None, str]] = {
    "single": (None, "single"),
    "ddp": ("ddp.yaml", "DDP × 2"),
    "zero2": ("zero2.yaml", "ZeRO-2 × 2"),
    "zero3": ("zero3.yaml", "ZeRO-3 × 2"),
    "zero3_offload": ("zero3_offload.yaml", "ZeRO-3, offloaded × 2"),
    "fsdp2": ("fsdp2.yaml", "FSDP2 × 2"),
}
# Name of a teacher: settings of the run. Those with an adapter are compared with a copy of the student's base.
TEACHERS: dict[str, dict[str, Any]] = {
    "replicated": {"teacher_placement": "replicate"},
    "zero3": {"teacher_placement": "zero3"},
    "zero3_offload": {"teacher_placement": "zero3_offload"},
    "fsdp2": {"teacher_placement": "fsdp2"},
    "device_map": {"teacher_placement": "device_map"},
    "cached hidden": {"teacher_placement": "cached", "teacher_cache": "hidden"},
    "cached top-k + tail, k = V": {"teacher_placement": "cached", "teacher_cache": "top-k, all"},
    "cached top-k + tail, k = V/2": {"teacher_placement": "cached", "teacher_cache": "top-k, half"},
    "LoRA, teacher a copy": {"teacher_placement": "replicate", "lora": True},
    "LoRA, adapter off": {"teacher_placement": "adapter_off", "lora": True},
    "DoRA, teacher a copy": {"teacher_placement": "replicate", "lora": True, "dora": True},
    "DoRA, adapter off": {"teacher_placement": "adapter_off", "lora": True, "dora": True},
}
CACHES: dict[str, dict[str, Any]] = {
    "hidden": {"teacher_cache_kind": "hidden"},
    "top-k, all": {"teacher_cache_kind": "topk", "teacher_cache_top_k": 14},
    "top-k, half": {"teacher_cache_kind": "topk", "teacher_cache_top_k": 7},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "GKD off-policy": ("gkd", {"lmbda": 0.0, "divergence": "forward_kl"}),
    "GKD on-policy": ("gkd", {"lmbda": 1.0}),
    "MiniLLM": ("minillm", {"lmbda": 1.0, "teacher_mix_alpha": 0.0, "temperature": 1e-6, "learning_rate": 0.05}),
    "DPKD": ("dpkd", {}),
    "Rationale": ("rationale", {"distill_weight": 0.5, "max_length": 48, "max_new_tokens": 20}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", nargs="+", default=[n for n in LAUNCHES], choices=LAUNCHES)
    parser.add_argument("--teachers", nargs="+", default=[*TEACHERS], choices=TEACHERS)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--gpu", action="store_true", help="two GPUs instead of two CPU processes")
    parser.add_argument("--json", type=Path, help="write every figure here; a file that is there is added to")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for one launch")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(json.loads(options.worker))
    found: dict[str, Any] = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())["results"]
    described = machine(1, "cuda" if options.gpu else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        for launch in options.launches:
            done = run(launch, Path(folder), options)
            for teacher, methods in done.items():
                found.setdefault(launch, {}).setdefault(teacher, {}).update(methods)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps({"machine": described, "results": found}, indent=1) + "\n")
    print(f"{described}\n\n{table(found)}")


def make_models(folder: Path) -> None:
    """A teacher and a student of random weights, and two adapters on the student that change what it says."""
    import torch
    from peft import LoraConfig, get_peft_model

    from distill_trainers.data.addition import character_tokenizer, tiny_llama

    tokenizer = character_tokenizer()
    models = {
        "teacher": tiny_llama(tokenizer, 64, 2, seed=0, tie_word_embeddings=False),
        "student": tiny_llama(tokenizer, 32, 2, seed=1),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("lora", "dora"):
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules="all-linear", use_dora=name == "dora", task_type="CAUSAL_LM")
        student = get_peft_model(tiny_llama(tokenizer, 32, 2, seed=1), config)
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        student.save_pretrained(folder / name)


def run(launch: str, folder: Path, options: Any) -> dict[str, Any]:
    """All cells of one launch, from one start of its processes."""
    config, shown = LAUNCHES[launch]
    out = folder / f"{launch}.json"
    job = {"folder": str(folder), "out": str(out), "gpu": options.gpu}
    job |= {"launch": launch, "teachers": options.teachers, "methods": options.methods}
    command = [sys.executable]
    if config:
        file = ROOT / "accelerate_configs" / (config if options.gpu else f"cpu_{config}")
        command += ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
        command += ["--mixed_precision", "no", "--main_process_port", str(29500 + os.getpid() % 400)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if not options.gpu:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    log = folder / f"{launch}.log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [*command, str(Path(__file__)), "--worker", json.dumps(job)],
            env=environment,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(timeout=options.timeout)
        except subprocess.TimeoutExpired:
            status = f"no end after {options.timeout} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the workers too, which outlive their launcher
    if status:
        print(f"{shown} failed ({status}); what it had done is kept:\n{log.read_text()[-4000:]}", file=sys.stderr)
    return json.loads(out.read_text()) if out.exists() else {}


# ---- One process of a launch ----------------------------------------------------------------------------------------


def worker(job: dict[str, Any]) -> None:
    """Train every method with every teacher, and write what came out after each."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for teacher in job["teachers"]:
        for method in job["methods"]:
            found.setdefault(teacher, {})[method] = cell(job, teacher, method)
            if int(os.environ.get("RANK", "0")) == 0:
                Path(job["out"]).write_text(json.dumps(found))
                print(teacher, method, found[teacher][method], flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own exit, after all the work is done


def cell(job: dict[str, Any], teacher: str, method: str) -> dict[str, Any]:
    """Losses and gradient norms of the optimiser steps, or why there are none."""
    from distill_trainers.exceptions import ConfigurationError

    settings = dict(TEACHERS[teacher])
    try:
        if cache := settings.get("teacher_cache"):
            settings |= CACHES[cache]
            settings["teacher_cache"] = str(fill(job, method, cache))
        trainer = build(job, method, settings)
        losses, norms = recorded(trainer)
        trainer.train()
    except ConfigurationError as error:
        return {"refused": str(error)}
    return {"loss": losses, "grad_norm": norms}


def fill(job: dict[str, Any], method: str, cache: str) -> Path:
    """The folder of a full cache, made by the processes of this launch with a whole teacher."""
    from distill_trainers.trainers.caching import fill_cache

    folder = Path(job["folder"]) / "caches" / "_".join((job["launch"], method, cache)).replace(" ", "_")
    settings = {**CACHES[cache], "teacher_cache": str(folder), "teacher_placement": "replicate"}
    trainer = build(job, method, settings)
    fill_cache(trainer)
    trainer.accelerator.wait_for_everyone()
    return folder


def build(job: dict[str, Any], method: str, settings: dict[str, Any]) -> Any:
    from distill_trainers.data.addition import RATIONALE_PROMPTS
    from distill_trainers.trainers import METHODS as TRAINERS

    settings, folder = dict(settings), Path(job["folder"])
    lora, dora = settings.pop("lora", False), settings.pop("dora", False)
    name, own = METHODS[method]
    config_class, trainer_class = TRAINERS[name]
    world = 1 if job["launch"] == "single" else 2
    args = config_class(
        **{
            "output_dir": str(folder / "run"),
            "use_cpu": not job["gpu"],
            "max_steps": STEPS,
            "per_device_train_batch_size": ROWS // world,
            "max_length": 32,
            "max_new_tokens": 4,
            "temperature": 0.0,
            "logging_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **(RATIONALE_PROMPTS if name == "rationale" else {}),
            **own,
            **settings,
        }
    )
    student: Any = str(folder / "student")
    teacher = str(folder / ("student" if lora else "teacher"))
    if lora:
        student = adapted(folder, "dora" if dora else "lora")
    without = args.teacher_placement in ("adapter_off", "cached")
    return trainer_class(student, None if without else teacher, args, rows(name), processing_class=tokenizer(folder))


def adapted(folder: Path, adapter: str) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "student")
    return PeftModel.from_pretrained(base, folder / adapter, is_trainable=True)


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "student")


def rows(method: str) -> Any:
    from datasets import Dataset

    from distill_trainers.data.addition import addition_dataset, addition_rationales, addition_rows

    if method == "rationale":
        return addition_rationales(ROWS * STEPS)
    if method == "dpkd":
        answers = enumerate(addition_rows(ROWS * STEPS))
        pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "7" * (1 + i % 3)} for i, r in answers]
        return Dataset.from_list(pairs)
    return addition_dataset(ROWS * STEPS)


def recorded(trainer: Any) -> tuple[list[float], list[float]]:
    """Lists that the trainer is going to fill: what its steps come to, unrounded."""
    losses: list[float] = []
    norms: list[float] = []
    after_step, grad_norm = trainer.after_step, trainer._get_grad_norm

    def keep_loss(loss: float) -> None:
        losses.append(float(loss))
        after_step(loss)

    def keep_norm(*args: Any, **kwargs: Any) -> Any:
        norm = grad_norm(*args, **kwargs)
        norms.append(float(norm))
        return norm

    trainer.after_step, trainer._get_grad_norm = keep_loss, keep_norm
    return losses, norms


# ---- The table ------------------------------------------------------------------------------------------------------


def reference_of(teacher: str) -> str:
    """The teacher of the single process that a teacher is compared with."""
    settings = TEACHERS[teacher]
    if settings.get("lora"):
        return "DoRA, teacher a copy" if settings.get("dora") else "LoRA, teacher a copy"
    return "replicated"


def differences(one: dict[str, Any], two: dict[str, Any]) -> tuple[float, float]:
    """Largest relative difference of the losses and of the gradient norms."""
    pairs = [zip(one[name], two[name], strict=True) for name in ("loss", "grad_norm")]
    loss, norm = (max(abs(a - b) / abs(a) for a, b in pair) for pair in pairs)
    return loss, norm


def table(found: dict[str, Any]) -> str:
    """Markdown: a row for each launch and teacher, and in each cell loss and gradient norm or their differences."""
    methods = [name for name in METHODS if any(name in cells for t in found.values() for cells in t.values())]
    lines = [f"| student | teacher | {' | '.join(methods)} |", "|---" * (len(methods) + 2) + "|"]
    for launch, teachers in found.items():
        for teacher, cells in teachers.items():
            shown = [show(found, launch, teacher, method) if method in cells else "" for method in methods]
            if any(text not in ("", "—") for text in shown):
                lines.append(f"| {LAUNCHES[launch][1]} | {teacher} | {' | '.join(shown)} |")
    return "\n".join(lines)


def show(found: dict[str, Any], launch: str, teacher: str, method: str) -> str:
    mine, reference = found[launch][teacher][method], reference_of(teacher)
    if "refused" in mine:
        return "—"
    if launch == "single" and teacher == reference:
        return f"loss {mine['loss'][0]:.6f}, norm {mine['grad_norm'][0]:.6f}"
    expected = found.get("single", {}).get(reference, {}).get(method)
    if expected is None or "refused" in expected:
        return "no reference"
    return "{:.0e}, {:.0e}".format(*differences(expected, mine))


if __name__ == "__main__":
    main()
