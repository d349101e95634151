"""The doctor's memory formula beside measured peaks: real runs of one and of two processes on this CPU.

    python benchmarks/memory.py                          # every run once; student 58M, teacher 134M parameters
    python benchmarks/memory.py --runs ddp zero3         # some of them
    python benchmarks/memory.py --quick --json out.json  # the same code on a toy, for the tests

Each run is a process (or a launch of two) of its own: GKD on random tokens, two optimiser steps. Measured is the
highest resident memory of a rank in the second step, when the optimiser's states are there, less what the process
had before it made its models (imports). glibc is told to give large blocks back, as else freed ones would count.
Seconds are of the last step, beside what the doctor makes of it; they say little on a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import in_turns, machine, medians, write_results

ROOT = Path(__file__).parents[1]
FULL = {"hidden": 512, "layers": 8, "teacher_hidden": 768, "teacher_layers": 12, "vocab": 32000, "length": 128}
QUICK = {"hidden": 64, "layers": 2, "teacher_hidden": 96, "teacher_layers": 2, "vocab": 512, "length": 32}
# Name: launch configuration (None: this process alone), settings of the trainer, and what else is different.
RUNS: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "single": (None, {}, {}),
    "checkpointing": (None, {"gradient_checkpointing": True}, {}),
    "accumulation": (None, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}),
    "bf16": (None, {"bf16": True}, {}),
    "sgd": (None, {"optim": "sgd"}, {}),
    "small chunks": (None, {"loss_chunk_mib": 4.0}, {}),
    "lora": (None, {}, {"lora": True}),
    "tied, 16-bit teacher": (None, {}, {"tied": True, "teacher_dtype": "bfloat16"}),
    "lora, adapter off": (None, {"teacher_placement": "adapter_off"}, {"lora": True}),
    "cached": (None, {"teacher_placement": "cached"}, {}),
    "on-policy": (None, {"lmbda": 1.0, "max_new_tokens": 32}, {}),
    "ddp": ("cpu_ddp.yaml", {}, {}),
    "ddp, lora, adapter off": ("cpu_ddp.yaml", {"teacher_placement": "adapter_off"}, {"lora": True}),
    "ddp, cached": ("cpu_ddp.yaml", {"teacher_placement": "cached"}, {}),
    "zero2": ("cpu_zero2.yaml", {}, {}),
    "zero3": ("cpu_zero3.yaml", {}, {}),
    "zero3, checkpointing": ("cpu_zero3.yaml", {"gradient_checkpointing": True}, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy size")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--repeats", type=int, default=1, help="how often each run is made")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch and rank")
    parser.add_argument("--json", type=Path, help="write all measurements here")
    parser.add_argument("--only", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
    elif options.only:
        print(json.dumps(launch(options)))
    else:
        environment = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        results = in_turns(__file__, options.runs, options.repeats, environment=environment)
        sizes = QUICK if options.quick else FULL
        described = f"{machine(1, 'cpu')}\n\nSizes: {sizes}; {options.rows} rows of a micro-batch."
        print(f"{described}\n\n{table(results)}")
        write_results(options.json, described, results)


def launch(options: argparse.Namespace) -> dict[str, float]:
    """Start the run's processes; the figures of the rank that took most."""
    config = RUNS[options.only][0]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if config is not None:
            command += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / config)]
            command += ["--main_process_port", str(29600 + os.getpid() % 300)]
        given = ["--quick"] if options.quick else []
        command += [__file__, *given, "--rows", str(options.rows), "--only", options.only, "--worker", folder]
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        ranks = [json.loads(file.read_text()) for file in Path(folder).glob("rank-*.json")]
        if not ranks or done.returncode:
            raise SystemExit(done.stderr[-4000:])
    return max(ranks, key=lambda rank: rank["measured_mib"])


def work(options: argparse.Namespace) -> None:
    """One rank: train, measure, predict."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from distill_trainers import GKDConfig, GKDTrainer
    from distill_trainers.doctor import Launch, estimate, read_launch, shape_of
    from distill_trainers.doctor.case import Case
    from distill_trainers.doctor.pace import measured_rates, pace_of
    from distill_trainers.doctor.work import placement_of, workload
    from distill_trainers.toy import character_tokenizer, tiny_llama
    from distill_trainers.trainers.lifecycle.cache_filling import fill_cache

    config, settings, more = RUNS[options.only]
    sizes = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    if config and "zero" in config:
        import deepspeed  # noqa: F401  # its imports belong to the baseline

    tokenizer = character_tokenizer()
    size = {"vocab_size": sizes["vocab"], "max_position_embeddings": 2 * sizes["length"]}
    args = GKDConfig(
        output_dir=str(options.worker / "out"),
        **{"max_steps": 2, "per_device_train_batch_size": options.rows, "lmbda": 0.0, "max_length": sizes["length"]}
        | {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
        | ({"max_new_tokens": min(32, sizes["length"] // 4)} if options.quick else {})
        | {name: value for name, value in settings.items() if value != "cached"}
        | ({"max_new_tokens": 8} if options.quick else {}),
    )
    on_cpu = Launch(on_cpu=True) if config is None else read_launch(ROOT / "accelerate_configs" / config)
    rates = measured_rates("cpu", torch.bfloat16 if args.bf16 else torch.float32)
    before = _status("VmRSS")

    width, heads = sizes["hidden"], sizes["hidden"] // 64
    inner = {"intermediate_size": width * 11 // 4, "num_attention_heads": heads, "num_key_value_heads": heads}
    student = tiny_llama(tokenizer, width, sizes["layers"], tie_word_embeddings=bool(more.get("tied")), **size, **inner)
    width, heads = sizes["teacher_hidden"], sizes["teacher_hidden"] // 64 or 1
    inner = {"intermediate_size": width * 8 // 3, "num_attention_heads": heads, "num_key_value_heads": heads}
    teacher = tiny_llama(tokenizer, width, sizes["teacher_layers"], tie_word_embeddings=False, **size, **inner)
    teacher_dtype = more.get("teacher_dtype", "float32")
    teacher.to(getattr(torch, teacher_dtype))
    shapes: list[Any] = [shape_of(student), shape_of(teacher)]
    peft_config = None
    if more.get("lora"):
        from peft import LoraConfig

        peft_config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")

    class Watch(TrainerCallback):
        """From the second step on: the peak so far is forgotten, the clock starts."""

        seconds = started = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                Path("/proc/self/clear_refs").write_text("5")
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.started

    watch, rows = Watch(), Dataset.from_list(_rows(sizes))
    if settings.get("teacher_placement") == "cached":
        args.teacher_cache, args.teacher_placement = str(options.worker / "cache"), "replicate"
        fill_cache(GKDTrainer(student, teacher, args, rows, processing_class=tokenizer))
        args.teacher_placement = "cached"
    trainer = GKDTrainer(
        model=student,
        teacher_model=None if args.teacher_placement in ("adapter_off", "cached") else teacher,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[watch],
    )
    if peft_config is not None:
        shapes[0] = shape_of(trainer.model)
    if args.teacher_placement == "adapter_off":
        shapes[1] = None
    del student, teacher
    trainer.train()
    measured = _status("VmHWM") - before
    samples = trainer.requirements.samples_completions
    load = workload(args, "gkd", on_cpu, teacher_dtype=teacher_dtype, samples=samples)
    placement = placement_of(args, "teacher", on_cpu, cached=False)
    need = estimate(*shapes, load, on_cpu, placement)
    case = Case(args, on_cpu, "student", "teacher", samples=samples, work=load, placement=placement)
    case.lengths = [len(row["input_ids"]) for row in _rows(sizes)]
    case.prompt_lengths = [row["labels"].count(-100) for row in _rows(sizes)]
    case.student_shape, case.teacher_shape = shapes
    pace = pace_of(case, rates)
    report = {
        "measured_mib": measured,
        "predicted_mib": need.peak / 2**20,
        "held_mib": sum(need.held.values()) / 2**20,
        "seconds": watch.seconds,
        "expected_seconds": pace.seconds if pace and pace.seconds else float("nan"),
    }
    rank = int(os.environ.get("RANK", "0"))
    (options.worker / f"rank-{rank}.json").write_text(json.dumps(report))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own exit


def _rows(sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of random tokens, three quarters of them trained; one row in four is shorter, so there is padding."""
    import torch

    draw = torch.Generator().manual_seed(0)
    rows = []
    for number in range(64):
        length = sizes["length"] - (3 if number % 4 == 0 else 0)
        ids = torch.randint(3, min(sizes["vocab"], 13), (length,), generator=draw).tolist()
        prompt = sizes["length"] // 4
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def _status(name: str) -> float:
    """A figure of this process from the kernel, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Predicted beside measured."""
    lines = ["| run | predicted MiB | measured MiB | predicted / measured | s a step | expected at least |"]
    lines.append("|---|---|---|---|---|---|")
    for name, got in medians(results).items():
        predicted, measured = got["predicted_mib"], got["measured_mib"]
        times = f"{got['seconds']:.1f} | {got['expected_seconds']:.1f}"
        lines.append(f"| {name} | {predicted:.0f} | {measured:.0f} | {predicted / measured:.2f} | {times} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
