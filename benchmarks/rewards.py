"""Does a student pass its teacher with rewards? Two-digit sums, from a teacher that is right on about four of five.

The teacher learns from right answers and is stopped early. A student of random weights learns its distribution, on the
teacher's own answers to other sums. From this student two runs go on, with the same prompts, the same number of samples
and the same steps, on the student's own text: the divergence alone, and rewards (1 for the right sum, else 0) with the
divergence as anchor. All are scored on 1,000 sums that nobody trains on, in two ways: the greedy answer, and the chance
that a sampled one is right, which is exact: the mean probability of right answers. A divergence is least where the
student has the teacher's distribution, so that the second is what it should keep. The first may rise: of a wrong greedy
answer the right one is often a close second. Right answers are never read but by the reward. CPU seconds are those of
the process.

    python benchmarks/rewards.py --out runs/rewards --seeds 0 1 2

Finished parts are kept in the folder, so that a run that was ended goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from distill_trainers import GKDConfig, GKDTrainer
from distill_trainers.toy import (
    ADAM_BETA2,
    addition_accuracy,
    addition_rows,
    character_tokenizer,
    fit_on_gold,
    tiny_llama,
)

ROWS = addition_rows()
TEACHER_ROWS, PROMPTS, HELD_OUT = ROWS[:2000], ROWS[2000:9000], ROWS[9000:]
CONTENDERS = {
    "divergence": {},
    "rewards": {"reward_funcs": ["exact"], "reward_schedule": "joint", "eval_pass_rows": 0},
}


def teacher_of(options: Any, tokenizer: Any) -> Any:
    folder = options.out / "teacher"
    if not (folder / "config.json").exists():
        model = tiny_llama(tokenizer, 64, 2, seed=0)
        fit_on_gold(model, tokenizer, TEACHER_ROWS, options.teacher_steps, 64, output_dir=str(options.out / "fit"))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def settings_of(options: Any, part: str, seed: int, **settings: Any) -> GKDConfig:
    return GKDConfig(
        output_dir=str(options.out / f"{part}-{seed}"),
        completions_dir=str(options.out / "completions"),
        max_length=16,
        max_new_tokens=5,
        adam_beta2=ADAM_BETA2,
        weight_decay=0.1,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        verify_saved=False,
        **settings,
    )


def distilled(options: Any, tokenizer: Any, teacher: Any, seed: int) -> dict[str, Any]:
    """Teach a student of random weights the teacher's distribution, on the teacher's answers."""
    args = settings_of(
        options,
        "distilled",
        seed,
        lmbda=0.0,
        seq_kd=True,
        divergence="forward_kl",
        max_steps=options.distil_steps,
        per_device_train_batch_size=256,
        rollout_batch_size=500,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=options.distil_steps // 10,
    )
    student = tiny_llama(tokenizer, 64, 2, seed=100 + seed)
    return trained(options, "distilled", args, student, teacher, tokenizer, seed)


def continued(options: Any, tokenizer: Any, teacher: Any, seed: int, name: str) -> dict[str, Any]:
    """Go on from there, on the student's own text."""
    own = CONTENDERS[name] if name == "divergence" else {**CONTENDERS[name], "anchor_weight": options.anchor}
    args = settings_of(
        options,
        name,
        seed,
        lmbda=1.0,
        divergence="reverse_kl",
        num_generations=4,
        max_steps=options.steps,
        per_device_train_batch_size=options.rows,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=10,
        **own,
    )
    folder = options.out / ("teacher" if options.start == "teacher" else f"distilled-{seed}/student")
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return trained(options, name, args, student, teacher, tokenizer, seed)


def trained(options: Any, part: str, args: GKDConfig, student: Any, teacher: Any, tokenizer: Any, seed: int) -> dict:
    rows = Dataset.from_list([{"prompt": row["prompt"], "answer": row["completion"]} for row in PROMPTS])
    trainer = GKDTrainer(student, teacher, args, rows, processing_class=tokenizer, teacher_processing_class=tokenizer)
    started = time.process_time()
    trainer.train()
    spent = time.process_time() - started
    trainer.model.save_pretrained(Path(args.output_dir) / "student")
    tokenizer.save_pretrained(Path(args.output_dir) / "student")
    logs = [row for row in trainer.state.log_history if "loss" in row]
    shown = ("reward_mean", "reward_flat_groups", "entropy", "divergence")
    return {
        "part": part,
        "seed": seed,
        "cpu_s": round(spent, 1),
        "steps": args.max_steps,
        **{name: [round(row[name], 4) for row in logs[:: max(1, len(logs) // 8)] if name in row] for name in shown},
    }


@torch.no_grad()
def right(folder: Path, tokenizer: Any) -> dict[str, float]:
    """Score a saved model: right greedy answers, and the mean chance of right ones when it samples."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in HELD_OUT]
    answers = [tokenizer(row["completion"], add_special_tokens=False)["input_ids"] for row in HELD_OUT]
    width = max(map(len, prompts)) + max(map(len, answers)) + 1
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = [*prompt, *answer, tokenizer.eos_token_id]
        ids[row, : len(whole)] = torch.tensor(whole)
        is_answer[row, len(prompt) : len(whole)] = True
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1)  # padding is behind everything that is read
    of_ids = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    chances = torch.where(is_answer[:, 1:], of_ids, 0).sum(1).exp()
    return {"greedy": addition_accuracy(model, tokenizer, HELD_OUT), "sampled": chances.mean().item()}


def kept(file: Path, compute: Any) -> None:
    if not file.exists():
        result = compute()
        file.with_suffix(".part").write_text(json.dumps(result, indent=1))
        file.with_suffix(".part").rename(file)
    print(json.dumps(json.loads(file.read_text())), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rewards"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher-steps", type=int, default=760)
    parser.add_argument("--distil-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=1200, help="optimiser steps on the student's own text")
    parser.add_argument("--rows", type=int, default=256, help="completions in such a step, 4 of each prompt")
    parser.add_argument(
        "--start", choices=("distilled", "teacher"), default="distilled", help="teacher: from a copy of its weights"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--anchor", type=float, default=0.05, help="β, weight of the divergence beside rewards")
    parser.add_argument("--only-base", action="store_true", help="make teacher, student and data, and end")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="of the contenders")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", PROMPTS), ("test", HELD_OUT)):
        lines = (json.dumps({"question": row["prompt"], "answer": row["completion"]}) for row in rows)
        (options.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    torch.set_num_threads(1)
    tokenizer = character_tokenizer()
    teacher = teacher_of(options, tokenizer)
    scores = {"teacher": [right(options.out / "teacher", tokenizer)]}
    for seed in options.seeds:
        base = ("distilled",) if options.start == "distilled" else ()
        for part in (*base, *(() if options.only_base else options.only)):
            file = options.out / f"{part}-{seed}.json"
            if part == "distilled":
                kept(file, lambda s=seed: distilled(options, tokenizer, teacher, s))
            else:
                kept(file, lambda s=seed, p=part: continued(options, tokenizer, teacher, s, p))
            scores.setdefault(part, []).append(right(options.out / f"{part}-{seed}" / "student", tokenizer))
    for part, of_seeds in scores.items():
        for way in ("greedy", "sampled"):
            values = [score[way] for score in of_seeds]
            print(f"{part}, {way}: {statistics.mean(values):.3f} (" + ", ".join(f"{v:.3f}" for v in values) + ")")


if __name__ == "__main__":
    main()
