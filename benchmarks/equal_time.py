"""How near a student comes to its teacher in equal time, with our GKDTrainer and with TRL's trainers.

    python benchmarks/equal_time.py --teacher runs/demo/teacher --work runs/equal_time --seconds 240

All start from one student, 20 of the teacher's 30 layers, and train on the same answers of the teacher (TRL's
DistillationTrainer: on the same prompts, since it has no off-policy mode), with the same batch size, learning rate and
loss (forward KL), until the time is over. Loading, answering and choosing layers are done once, for all, and not
counted; filling a cache of the teacher is counted. The student that was reached is then judged on answers of the
teacher to held-out prompts, always by the same code. Each trainer has a process of its own, one after the other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import machine, write_results

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "smollm2-135m" / "gkd.yaml"
WARMUP = 3  # steps
HELD_OUT = 64  # of a file of prompts
CONTENDERS = {
    "ours": "ours: GKDTrainer, live teacher",
    "ours_cached": "ours: GKDTrainer, teacher's answers kept as they are met",
    "trl": "TRL: GKDTrainer, off-policy",
    "trl_distillation": "TRL: DistillationTrainer, on-policy",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--work", type=Path, default=Path("runs/equal_time"), help="folder for everything made")
    parser.add_argument("--seconds", type=float, default=240, help="of training, for each")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--decay", action="store_true", help="let the learning rate fall to 0 as the time runs out")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--keep-layers", type=int, default=20)
    parser.add_argument("--trainers", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--prompts", type=Path, help=f"JSON lines with a prompt each; the last {HELD_OUT} are held out")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run(options.only, options)
        return
    if not (options.work / "student" / "config.json").is_file():
        run_alone("prepare")
    described = f"{machine(options.threads)}\n\n{settings_line(options)}"
    print(f"{described}\n", flush=True)
    results = {name: run_alone(name) for name in ["start", *options.trainers]}
    print(table(results))
    write_results(options.json, described, results)


def run_alone(name: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed")
    print(f"  {name}: {done.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(name: str, options: argparse.Namespace) -> None:
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if name == "prepare":
        prepare(options)
        print("{}")
        return
    found = {"steps": 0, "seconds": 0.0, "seconds_per_step": 0.0}
    student = str(options.work / "student")
    if name != "start":
        found, student = train(name, options), str(options.work / name)
    metrics = judge(student, options)
    names = ("eval_kl", "eval_top1_agreement", "eval_perplexity", "eval_tokens")
    print(json.dumps({**found, **{key.removeprefix("eval_"): metrics[key] for key in names}}))


def prepare(options: argparse.Namespace) -> None:
    """The student, and the teacher's answers as conversations, which every trainer reads alike."""
    from distill_trainers.cli.train import build_trainer
    from distill_trainers.recipe.parse import parse_recipe

    init = {"from_teacher": True, "keep_layers": options.keep_layers, "strategy": "importance", "measure": "kl"}
    files = {part: RECIPE.parent / f"prompts_{part}.jsonl" for part in ("train", "heldout")}
    if options.prompts:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
        files = {part: options.work / f"prompts_{part}.jsonl" for part in files}
        options.work.mkdir(parents=True, exist_ok=True)
        files["train"].write_text("\n".join(lines[:-HELD_OUT]) + "\n", encoding="utf-8")
        files["heldout"].write_text("\n".join(lines[-HELD_OUT:]) + "\n", encoding="utf-8")
    arguments = ["--config", str(RECIPE), "--teacher_model_name_or_path", options.teacher]
    arguments += ["--dataset", str(files["train"]), "--eval_dataset", str(files["heldout"])]
    arguments += ["--output_dir", str(options.work), "--student_init", json.dumps({**init, "importance_batches": 1})]
    trainer = build_trainer(parse_recipe(arguments))
    trainer.get_train_dataloader()
    held_out = trainer.get_eval_dataloader().dataset
    for part, rows in (("train", trainer.train_dataset), ("heldout", held_out)):
        prompts = files[part].read_text(encoding="utf-8").splitlines()
        with open(options.work / f"{part}.jsonl", "w", encoding="utf-8") as file:
            for line, row in zip(prompts, rows, strict=True):
                prompt = json.loads(line)["prompt"]
                turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
                answer = trainer.processing_class.decode(
                    row["input_ids"][row["prompt_length"] :], skip_special_tokens=True
                )
                file.write(json.dumps({"messages": [*turns, {"role": "assistant", "content": answer}]}) + "\n")
    shutil.copytree(options.work / "student_init", options.work / "student", dirs_exist_ok=True)


def rows_of(part: str, options: argparse.Namespace) -> Any:
    from datasets import load_dataset

    return load_dataset("json", data_files=str(options.work / f"{part}.jsonl"), split="train")


def load(folder: str, dtype: str = "float32") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def train(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Train until the next step would not end in time; save the student."""
    import transformers

    class TimeLimit(transformers.TrainerCallback):
        """A limit on training alone: from its start to the end of the last step, filling of caches included."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.ends = [started]

        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            if options.decay and state.global_step >= WARMUP:  # steps differ between trainers, so by the clock
                left = max(0.0, 1 - (time.perf_counter() - started) / options.seconds)
                for group in optimizer.param_groups:
                    group["lr"] = options.learning_rate * left

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            self.ends.append(time.perf_counter())
            longest = max(after - before for before, after in zip(self.ends, self.ends[1:], strict=False))
            if self.ends[-1] + 0.5 * longest - started > options.seconds:
                control.should_training_stop = True
            return control

    trainer, clock = build(name, options), TimeLimit()
    trainer.add_callback(clock)
    started = time.perf_counter()
    trainer.train()
    trainer.save_model(str(options.work / name))
    steps = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    return {
        "steps": len(steps),
        "seconds": clock.ends[-1] - started,
        "seconds_per_step": statistics.median(steps),
    }


def build(name: str, options: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    student, teacher = load(str(options.work / "student")), load(options.teacher, "bfloat16")
    models = {"model": student, "teacher_model": teacher, "processing_class": tokenizer}
    settings: dict[str, Any] = {
        "output_dir": str(options.work / f"{name}_run"),
        "use_cpu": True,
        "bf16": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10,
        "max_steps": 10_000,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": WARMUP,
        "weight_decay": 0.0,
        "activation_checkpointing": False,
        "seed": 0,
    }
    rows = rows_of("train", options)
    if name == "trl_distillation":
        from trl import DistillationConfig, DistillationTrainer

        prompts = rows.map(lambda row: {"prompt": row["messages"][:-1]}, remove_columns=["messages"])
        args = DistillationConfig(**settings, beta=0.0, temperature=1.0, max_completion_length=64)
        return DistillationTrainer(**models, args=args, train_dataset=prompts)
    settings |= {"lmbda": 0.0, "max_length": 256, "max_new_tokens": 64}
    if name == "trl":
        from trl.experimental.gkd import GKDConfig as TrlConfig
        from trl.experimental.gkd import GKDTrainer as TrlTrainer

        return TrlTrainer(**models, args=TrlConfig(**settings, beta=0.0, temperature=1.0), train_dataset=rows)
    from distill_trainers import GKDConfig, GKDTrainer

    settings |= {"divergence": "forward_kl", "train_sampling_strategy": "group_by_length"}
    if name == "ours_cached":
        cache = options.work / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        settings["teacher_cache"] = str(cache)
        models["teacher_model"] = options.teacher  # kept only until all answers are
        settings["teacher_model_init_kwargs"] = {"dtype": "bfloat16"}
    return GKDTrainer(**models, args=GKDConfig(**settings), train_dataset=rows)


def judge(student: str, options: argparse.Namespace) -> dict[str, float]:
    from transformers import AutoTokenizer

    from distill_trainers import GKDConfig, GKDTrainer

    args = GKDConfig(
        output_dir=str(options.work / "judge"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        lmbda=0.0,
        max_length=256,
        per_device_eval_batch_size=16,
    )
    return GKDTrainer(
        load(student),
        load(options.teacher),
        args,
        eval_dataset=rows_of("heldout", options),
        processing_class=AutoTokenizer.from_pretrained(options.teacher),
    ).evaluate()


def table(results: dict[str, dict[str, float]]) -> str:
    lines = [
        "| trainer | steps | s | s per step | held-out KL to the teacher | top-1 agreement | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, got in results.items():
        lines.append(
            f"| {CONTENDERS.get(name, 'the student at the start')} | {got['steps']} | {got['seconds']:.0f} "
            f"| {got['seconds_per_step']:.2f} | {got['kl']:.3f} | {got['top1_agreement']:.3f} "
            f"| {got['perplexity']:.1f} |"
        )
    return "\n".join(lines)


def settings_line(options: argparse.Namespace) -> str:
    return (
        f"{Path(options.teacher).name}: {options.keep_layers} of its layers as the student; {options.seconds:.0f} s "
        f"each; batch {options.batch_size}, forward KL, learning rate {options.learning_rate:g}"
        f"{' falling to 0 with the time' if options.decay else ''}, bfloat16 autocast."
    )


if __name__ == "__main__":
    main()
