"""Two LoRA experts into one student: is each as well learnt as by a student that has that expert alone?

    python benchmarks/experts.py --seeds 0 1 2
    python benchmarks/experts.py --quick            # two steps of everything, for the tests

A small Llama learns sums and differences of two-digit numbers for a while. From there an adapter is tuned on sums and
another one on differences. Students are new adapters on the same base: one learns from both experts by the forward KL,
each row from its own (`teachers`), two from one expert each, on the very same rows of that domain in as many steps. So
a step of the common student has twice the rows, and as many tokens of a domain as a step of that domain's own student.
Judged on held-out problems: KL(expert || student), and which part of it is closed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measuring import machine, write_results
from prompt_distillation import bytes_tokenizer, spread

DOMAINS = {"addition": "+", "subtraction": "-"}
PROBLEMS, HELD_OUT = 2000, 250  # of each domain; the held-out ones are others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/experts"), help="folder for everything made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base-steps", type=int, default=300, help="of 128 rows of both domains")
    parser.add_argument("--expert-steps", type=int, default=400, help="of 128 rows")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=64, help="of each domain in a step of a student")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="of adapters")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help="two steps of everything")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    if options.quick:
        options.base_steps = options.expert_steps = options.steps = 2
    settings = (
        f"{options.steps} steps of {options.rows} rows a domain, learning rate {options.learning_rate}, LoRA r 16"
    )
    described = f"{machine(options.threads)}\n\n{settings}; base {options.base_steps}, experts {options.expert_steps}"
    print(f"{described}\n", flush=True)
    set_up(options)
    for name in ("base", *(f"expert-{domain}" for domain in DOMAINS)):
        print(f"  {name}: {taught(name, options)}", file=sys.stderr, flush=True)
    results: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        for name, domains in {"both": tuple(DOMAINS), **{domain: (domain,) for domain in DOMAINS}}.items():
            results.setdefault(name, []).append(student(domains, seed, options))
            print(f"  {name}, seed {seed}: {results[name][-1]}", file=sys.stderr, flush=True)
        write_results(options.json, described, results)
    print(table(results))


def set_up(options: argparse.Namespace) -> None:
    import datasets
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    options.work.mkdir(parents=True, exist_ok=True)


def problems(domain: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All problems of a domain with right answers, in one order: those to train on, and those held out."""
    pairs = [(a, b) for a in range(100) for b in range(100) if domain == "addition" or a >= b]
    random.Random(0).shuffle(pairs)
    rows = [
        {
            "prompt": f"{a}{DOMAINS[domain]}{b}=",
            "completion": str(a + b if domain == "addition" else a - b),
            "teacher": domain,
        }
        for a, b in pairs
    ]
    return rows[:PROBLEMS], rows[-HELD_OUT:]


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def taught(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Train the base, or an expert, on right answers; return its accuracy by domain."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from distill_trainers.toy import addition_accuracy, fit_on_gold, tiny_llama

    torch.manual_seed(0)
    tokenizer, folder = bytes_tokenizer(), options.work / name
    own = [domain for domain in DOMAINS if name in ("base", f"expert-{domain}")]
    rows = [row for pair in zip(*(problems(domain)[0] for domain in own), strict=False) for row in pair]
    how: dict[str, Any] = {"output_dir": str(options.work / "run")}
    model: Any
    if name == "base":
        model, steps = tiny_llama(tokenizer, 64, 2), options.base_steps
    else:
        base = AutoModelForCausalLM.from_pretrained(options.work / "base")
        model, steps = get_peft_model(base, adapter()), options.expert_steps
        how["learning_rate"] = options.learning_rate
    fit_on_gold(model, tokenizer, rows, steps, **how)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {domain: addition_accuracy(model, tokenizer, problems(domain)[1]) for domain in DOMAINS}


def student(domains: tuple[str, ...], seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train on the rows of some domains; judge on those of both."""
    started = time.process_time()
    from datasets import Dataset

    from distill_trainers import GKDConfig, GKDTrainer
    from distill_trainers.toy import ADAM_BETA2

    train = [row for pair in zip(*(problems(domain)[0] for domain in domains), strict=False) for row in pair]
    base = str(options.work / "base")
    trainer = GKDTrainer(
        model=base,
        teacher_model={
            domain: {"teacher_model_name_or_path": base, "teacher_adapter": str(options.work / f"expert-{domain}")}
            for domain in DOMAINS
        },
        args=GKDConfig(
            output_dir=str(options.work / f"run-{'-'.join(domains)}-{seed}"),
            overwrite_output_dir=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            lmbda=0.0,
            divergence="forward_kl",
            max_length=16,
            max_steps=options.steps,
            per_device_train_batch_size=options.rows * len(domains),
            per_device_eval_batch_size=HELD_OUT,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 10),
            adam_beta2=ADAM_BETA2,
            logging_steps=100,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list([row for domain in DOMAINS for row in problems(domain)[1]]),
        peft_config=adapter(),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    scores = {"before": before, "after": after}
    found = {f"{when}/{name}": score[f"eval_kl/{name}"] for when, score in scores.items() for name in DOMAINS}
    return {**found, "cpu_seconds": time.process_time() - started}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| domain | KL before | its own student | closed | the common one | closed | of its own's |",
        "|---" * 7 + "|",
    ]
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
