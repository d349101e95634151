"""Rewards on a real model: answers of one sentence, by divergence alone, and with rewards beside it.

    python benchmarks/format_rewards.py --model runs/demo/teacher --work runs/format --steps 24 --seeds 0
    python benchmarks/format_rewards.py --quick                 # the same code on a toy, for the tests

The student is a new LoRA adapter on an instruct model, and sees bare questions. Its teacher is the same model without
the adapter, which is asked for one short sentence and gives one in about half of its answers. Both contenders learn on
the student's own text by the reverse KL: one in all steps, the other in the first half, then by rewards (1 for one
sentence that ends, else 0) with the divergence as anchor. Judged by pass@1 on held-out questions, 4 samples each at
temperature 1, at the start, in the middle and at the end; the teacher by the same judge.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from measuring import keep_settings, machine, write_results
from prompt_distillation import HELD_OUT, PROMPTS, alone, kept, parser_of, prompts, spread, toy

ASKED = "{prompt}\n\nAnswer in one short sentence."
ONE_SENTENCE = r"format:^\s*[^.!?\n]+[.!?]\s*$"
CONTENDERS = ("divergence", "rewards")
MOMENTS = ("before", "halfway", "after")


def main() -> None:
    own = {"work": Path("runs/format"), "batch_size": 16, "learning_rate": 5e-4, "new_tokens": 40, "rows": 48}
    parser = parser_of(__doc__, **own)
    parser.add_argument("--anchor", type=float, default=0.05, help="β, weight of the divergence beside rewards")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rows, options.new_tokens, options.batch_size = 2, 2, 4, 4
        options.model = str(options.work / "toy")
    if options.only:
        kept(options.only[0], int(options.only[1]), options, run)
        return
    keep_settings(options)
    settings = f"{options.steps} steps of {options.batch_size}, learning rate {options.learning_rate}, LoRA r 16"
    described = f"{machine(options.threads)}\n\n{settings}, β {options.anchor}; {options.rows} held-out questions"
    print(f"{described}\n", flush=True)
    results = {"teacher": [alone(__file__, "teacher", 0, options.work)]}
    for name in options.contenders:
        results[name] = [alone(__file__, name, seed, options.work) for seed in options.seeds]
    print(table(results))
    write_results(options.json, described, results)


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one contender; `teacher` is judged alone."""
    from datasets import Dataset
    from peft import LoraConfig

    from distill_trainers import GKDConfig, GKDTrainer

    if options.quick and not (options.work / "toy").is_dir():
        toy(options.work / "toy")
    held_out = prompts(HELD_OUT, options.rows)
    if name == "teacher":
        for row in held_out:
            row["prompt"][-1]["content"] = ASKED.format(prompt=row["prompt"][-1]["content"])
    half = options.steps // 2
    args = GKDConfig(
        output_dir=str(options.work / f"run-{name}-{seed}"),
        overwrite_output_dir=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        teacher_placement="adapter_off",
        teacher_prompt=ASKED,
        lmbda=1.0,
        divergence="reverse_kl",
        reward_funcs=[ONE_SENTENCE],
        reward_schedule="after",
        reward_start=half if name == "rewards" else options.steps + 1,
        anchor_weight=options.anchor,
        num_generations=4,
        eval_pass_rows=options.rows,
        eval_strategy="steps",
        eval_steps=half,
        eval_on_start=True,
        max_length=384,
        max_new_tokens=options.new_tokens,
        rollout_batch_size=64,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        logging_steps=2,
        save_strategy="no",
    )
    trainer = GKDTrainer(
        model=options.model,
        args=args,
        train_dataset=Dataset.from_list(prompts(PROMPTS / "prompts_train.jsonl", 282)),
        eval_dataset=Dataset.from_list(held_out),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if name == "teacher":
        return {"before": trainer.evaluate()["eval_pass@1"]}
    started = time.process_time()
    trainer.train()
    passed = [entry for entry in trainer.state.log_history if "eval_pass@1" in entry]
    found = {moment: entry["eval_pass@1"] for moment, entry in zip(MOMENTS, passed, strict=True)}
    last = [entry for entry in trainer.state.log_history if "completion_length" in entry][-1]
    told = {"kl": passed[-1]["eval_kl"], "length": last["completion_length"], "entropy": last["entropy"]}
    return {**found, **told, "cpu_seconds": time.process_time() - started}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| | pass@1 before | halfway | after | KL to the teacher | tokens an answer | CPU seconds |"]
    lines.append("|---" * 7 + "|")
    lines.append(f"| the teacher, asked for it | {results['teacher'][0]['before']:.3f} | | | | | |")
    for name in [name for name in CONTENDERS if name in results]:
        runs = results[name]
        cells = [spread([run[moment] for run in runs]) for moment in (*MOMENTS, "kl")]
        cells += [spread([run[key] for run in runs], digits) for key, digits in (("length", 1), ("cpu_seconds", 0))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
