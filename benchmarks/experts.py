"""Two LoRA experts into one student: is each as well learnt as by a student that has that expert alone?

    python benchmarks/experts.py --model runs/demo/teacher --seeds 0 1 2
    python benchmarks/experts.py --quick            # the same code on a toy, for the tests

An adapter is tuned on sums and another one on differences (SFT, by TRL). A third one then learns from both by the
forward KL, each row from its own expert (`teachers`), and two more learn from one expert each, on the very same rows of
that domain, in as many steps. So each step of the common student has twice the rows, and as many tokens of a domain as
a step of that domain's own student. Judged on held-out rows: KL(expert || student), and which part of it is closed.
What a run has found is kept in the work folder: it goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from measuring import machine, write_results
from prompt_distillation import PROMPTS, alone, spread, toy

DOMAINS = ("addition", "subtraction")
HELD_OUT = 32  # the last rows, half of each domain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/demo/teacher", help="folder of an instruct model")
    parser.add_argument("--work", type=Path, default=Path("runs/experts"), help="folder for everything made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rows", type=int, default=4, help="of each domain in a step")
    parser.add_argument("--expert-steps", type=int, default=24, help="of 8 rows")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help="a toy model and two steps")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.steps = options.expert_steps = 2
        options.model = str(options.work / "toy")
    if options.only:
        run(options.only[0], int(options.only[1]), options)
        return
    settings = f"{options.steps} steps of {options.rows} rows a domain, learning rate {options.learning_rate}, LoRA r 16"
    described = f"{machine(options.threads)}\n\n{settings}; experts: {options.expert_steps} steps of 8"
    print(f"{described}\n", flush=True)
    for name in DOMAINS:
        alone(__file__, f"expert-{name}", 0, options.work)
    students = ("both", *DOMAINS)
    results = {name: [alone(__file__, name, seed, options.work) for seed in options.seeds] for name in students}
    print(table(results))
    write_results(options.json, described, results)


def run(name: str, seed: int, options: argparse.Namespace) -> None:
    import torch
    import transformers

    out = options.work / f"{name}-{seed}.json"
    if out.is_file():
        return
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.quick:
        toy(options.work / "toy")
    if name.startswith("expert-"):
        found = expert(name.removeprefix("expert-"), options)
    else:
        found = student(DOMAINS if name == "both" else (name,), seed, options)
    out.write_text(json.dumps(found))


def rows_of(domains: tuple[str, ...]) -> tuple[list[Any], list[Any]]:
    """Training rows of these domains, and the held-out rows of all."""
    lines = (PROMPTS / "data" / "two_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows[:-HELD_OUT] if row["teacher"] in domains], rows[-HELD_OUT:]


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def settings_of(options: argparse.Namespace, out: str) -> dict[str, Any]:
    return {
        "output_dir": str(options.work / out),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "max_length": 128,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "logging_steps": 8,
        "save_strategy": "no",
    }


def expert(domain: str, options: argparse.Namespace) -> dict[str, float]:
    """Tune an adapter on the right answers of one domain."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    train = Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for row in rows_of((domain,))[0]])
    args = SFTConfig(
        **settings_of(options, f"run-{domain}"),
        max_steps=options.expert_steps,
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(options.model, args=args, train_dataset=train, peft_config=adapter())
    started = time.process_time()
    trainer.train()
    trainer.model.save_pretrained(options.work / f"expert-{domain}")
    return {"cpu_seconds": time.process_time() - started, "loss": float(trainer.state.log_history[-1]["train_loss"])}


def student(domains: tuple[str, ...], seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train on the rows of some domains; judge on those of both."""
    from datasets import Dataset

    from distill_trainers import GKDConfig, GKDTrainer

    train, held_out = rows_of(domains)
    adapters = {name: str(options.work / f"expert-{name}") for name in DOMAINS}
    trainer = GKDTrainer(
        model=options.model,
        teacher_model={
            name: {"teacher_model_name_or_path": options.model, "teacher_adapter": path}
            for name, path in adapters.items()
        },
        args=GKDConfig(
            **settings_of(options, f"run-{'-'.join(domains)}-{seed}"),
            overwrite_output_dir=True,
            seed=seed,
            lmbda=0.0,
            divergence="forward_kl",
            max_steps=options.steps,
            per_device_train_batch_size=options.rows * len(domains),
            per_device_eval_batch_size=8,
        ),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        peft_config=adapter(),
    )
    before = trainer.evaluate()
    started = time.process_time()
    trainer.train()
    found = {"cpu_seconds": time.process_time() - started}
    after = trainer.evaluate()
    for name in DOMAINS:
        found |= {f"before/{name}": before[f"eval_kl/{name}"], f"after/{name}": after[f"eval_kl/{name}"]}
    return found


def table(results: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| domain | KL before | its own student | closed | the common one | closed | of its own's |", "|---" * 7 + "|"]
    for name in DOMAINS:
        own, common = results[name], results["both"]
        shares = [gap(both, name) / gap(one, name) for both, one in zip(common, own, strict=True)]
        cells = [f"{statistics.fmean(run[f'before/{name}'] for run in own):.3f}"]
        for runs in (own, common):
            closed = [100 * gap(run, name) / run[f"before/{name}"] for run in runs]
            cells += [spread([run[f"after/{name}"] for run in runs]), f"{spread(closed, 1)} %"]
        lines.append(f"| {name} | {' | '.join(cells)} | {spread([100 * share for share in shares], 1)} % |")
    return "\n".join(lines)


def gap(run: dict[str, float], name: str) -> float:
    """What is closed of KL(expert || student), in nats per token."""
    return run[f"before/{name}"] - run[f"after/{name}"]


if __name__ == "__main__":
    main()
