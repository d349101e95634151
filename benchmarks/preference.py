"""DPKD beside GKD in equal time: a student cut from its teacher, trained on the same prompts and teacher's answers.

    python benchmarks/preference.py --teacher runs/demo/teacher --work runs/preference --seconds 300

All contenders start from one student (20 of the teacher's 30 layers) and train with one batch size and learning rate
until so many seconds of CPU time are over, sampling included; loading, the teacher's answers and evaluation are not
counted. Each student is then judged by the same code on held-out prompts: forward KL and NLL on the teacher's sampled
answers, margins of those against the untrained student's own answers, and Rouge-L of greedy answers against the
teacher's greedy ones (`pip install rouge-score`; left out without it). Each contender has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "smollm2-135m"
FIXED: dict[str, Any] = {"beta": 0.1, "lm_loss_weight": 0.0, "length_normalized": False}
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gkd": ("gkd", {"lmbda": 0.0, "seq_kd": True, "divergence": "forward_kl"}),
    "gkd_on_policy": ("gkd", {"lmbda": 1.0, "divergence": "reverse_kl"}),
    "dpkd": ("dpkd", {}),
    "dpkd_refresh_8": ("dpkd", {"refresh_steps": 8, "replay_buffer_size": 64}),
    "contrastive_skew": ("dpkd", {"loss_type": "contrastive_skew", "refresh_steps": 8, "replay_buffer_size": 64}),
    "dpkd_fixed": ("dpkd", FIXED),  # on pairs made once: what is known to collapse
}
COLUMNS = {
    "steps": ("steps", "{:.0f}"),
    "eval_kl": ("KL, nats/token", "{:.3f}"),
    "eval_nll_chosen": ("NLL, teacher's", "{:.3f}"),
    "eval_nll_rejected": ("NLL, own before", "{:.3f}"),
    "eval_reward_margin": ("margin", "{:.3f}"),
    "eval_reward_accuracy": ("margins won", "{:.0%}"),
    "rouge_l": ("Rouge-L", "{:.1f}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--work", type=Path, default=Path("runs/preference"), help="folder for everything made")
    parser.add_argument("--seconds", type=float, default=300, help="of CPU time for training, for each")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=282, help="prompts to train on, of 282")
    parser.add_argument("--keep-layers", type=int, default=20)
    parser.add_argument("--strategy", default="importance", help="how the student's layers are chosen")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--quick", action="store_true", help="few prompts, few tokens: only shows that it runs")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run(options.only, options)
        return
    names = ["before", *options.contenders]
    for name in names:
        if not (options.work / f"{name}.json").is_file():
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], check=True)
    results = {name: json.loads((options.work / f"{name}.json").read_text()) for name in names}
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def table(results: dict[str, dict[str, float]]) -> str:
    shown = [name for name in COLUMNS if any(name in row for row in results.values())]
    lines = [["", *(COLUMNS[name][0] for name in shown)], ["---"] * (len(shown) + 1)]
    for title, row in results.items():
        lines.append([title, *(COLUMNS[name][1].format(row[name]) if name in row else "–" for name in shown)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(name: str, options: argparse.Namespace) -> None:
    """Train one contender in this process, judge it, write `<work>/<name>.json`."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    options.work.mkdir(parents=True, exist_ok=True)
    start = options.work / "start"
    if not (start / "config.json").is_file():
        make_start(options, start)
    result: dict[str, float] = {"steps": 0}
    student = str(start)
    if name != "before":
        student = str(options.work / name)
        result = train(name, options, start, student)
    result |= judge(options, start, student)
    (options.work / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table({name: result}), flush=True)


def make_start(options: argparse.Namespace, folder: Path) -> None:
    from distill_trainers.cli.checks import check_recipe
    from distill_trainers.cli.recipe import parse_recipe
    from distill_trainers.cli.train import make_initial_student

    init = {"from_teacher": True, "keep_layers": options.keep_layers, "strategy": options.strategy}
    init |= {"measure": "angular"} if options.strategy == "importance" else {}
    argv = ["--config", str(RECIPES / "gkd.yaml"), "--teacher_model_name_or_path", options.teacher]
    argv += ["--output_dir", str(options.work), "--student_init", json.dumps(init)]
    argv += ["--completions_dir", str(options.work / "completions"), "--eval_on_start", "false"]
    recipe = parse_recipe(argv)
    make_initial_student(recipe, check_recipe(recipe).rows(recipe)[0]).rename(folder)


def settings(options: argparse.Namespace, name: str) -> dict[str, Any]:
    tokens = 8 if options.quick else 64
    return {
        "output_dir": str(options.work / "runs" / name),
        "completions_dir": str(options.work / "completions"),
        "teacher_model_init_kwargs": {"dtype": "bfloat16"},
        "max_length": 256,
        "max_new_tokens": tokens,
        "rollout_batch_size": 96,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": 8,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "max_steps": 100000,
        "max_grad_norm": 1.0,
        "bf16": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def prompts(options: argparse.Namespace) -> tuple[Any, Any]:
    from distill_trainers.data import load_split

    train, held_out = (load_split(str(RECIPES / f"prompts_{part}.jsonl")) for part in ("train", "heldout"))
    return (train.take(8), held_out.take(4)) if options.quick else (train.take(options.prompts), held_out)


def train(name: str, options: argparse.Namespace, start: Path, output: str) -> dict[str, float]:
    from transformers import TrainerCallback

    from distill_trainers.trainers import METHODS

    class Budget(TrainerCallback):
        """Ends training when its CPU time is over."""

        begun = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun, self.clock = time.process_time(), time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = time.process_time() - self.begun > options.seconds

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            shown = {k: round(v, 3) for k, v in (logs or {}).items() if isinstance(v, float)}
            print(name, state.global_step, json.dumps(shown), flush=True)

    method, own = CONTENDERS[name]
    config, trainer_class = METHODS[method]
    rows = pairs(options, start) if name == "dpkd_fixed" else prompts(options)[0]
    budget = Budget()
    trainer = trainer_class(
        str(start), options.teacher, config(**settings(options, name), **own), rows, callbacks=[budget]
    )
    trainer.train()
    trainer.save_model(output)
    seconds = time.process_time() - budget.begun
    return {"steps": trainer.state.global_step, "cpu_seconds": seconds, "seconds": time.monotonic() - budget.clock}


def pairs(options: argparse.Namespace, start: Path) -> Any:
    """The teacher's answers against those of the student before training, made once."""
    from datasets import Dataset

    trainer = pair_trainer(options, str(start), start, prompts(options)[0])
    decode = trainer.processing_class.decode
    made = []
    for row in trainer.get_eval_dataloader().dataset:
        start_of = row["prompt_length"]
        sides = {"chosen": row["input_ids"][start_of:], "rejected": row["rejected_ids"]}
        texts = {side: decode(ids, skip_special_tokens=True) for side, ids in sides.items()}
        if texts["chosen"] != texts["rejected"] and all(map(str.strip, texts.values())):
            prompt = decode(row["input_ids"][:start_of])
            made.append({"prompt": prompt, **texts})
    return Dataset.from_list(made)


def pair_trainer(options: argparse.Namespace, student: str, start: Path, rows: Any) -> Any:
    """A trainer that only evaluates, on pairs of the teacher's answers and those of the student before training."""
    from distill_trainers import DPKDConfig, DPKDTrainer
    from distill_trainers.models import load_causal_lm
    from distill_trainers.teachers.local import weights_fingerprint

    trainer = DPKDTrainer(student, options.teacher, DPKDConfig(**settings(options, "judge")), None, rows)
    trainer.written_by = weights_fingerprint(load_causal_lm(str(start), dtype="float32"))
    return trainer


def judge(options: argparse.Namespace, start: Path, student: str) -> dict[str, float]:
    from distill_trainers.rollouts import DecodeEngine

    trainer = pair_trainer(options, student, start, prompts(options)[1])
    result = {key: value for key, value in trainer.evaluate().items() if key in COLUMNS or key == "eval_sequence_kl"}
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return result
    import dataclasses

    import torch

    ids = [row["input_ids"][: row["prompt_length"]] for row in trainer.eval_dataset]
    width, pad = max(map(len, ids)), trainer.sampling.pad_token_id
    inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    greedy = dataclasses.replace(trainer.sampling, temperature=0.0)

    def answers(model: Any) -> list[str]:
        written = DecodeEngine(batch_size=24).generate(model.eval(), inputs, mask, greedy)
        return [trainer.processing_class.decode(each, skip_special_tokens=True) for each in written]

    kept = options.work / "teacher_greedy.json"
    if not kept.is_file():
        kept.write_text(json.dumps(answers(trainer.teacher.model)))
    scorer = RougeScorer(["rougeL"])
    scores = [
        scorer.score(theirs, own)["rougeL"].fmeasure
        for theirs, own in zip(json.loads(kept.read_text()), answers(trainer.model), strict=True)
    ]
    return {**result, "rouge_l": 100 * sum(scores) / len(scores)}


if __name__ == "__main__":
    main()
