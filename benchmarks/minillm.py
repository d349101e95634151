"""What a step of MiniLLM costs beside an on-policy step of GKD with the reverse KL, in one run.

    python benchmarks/minillm.py                    # 49152 tokens, teacher half as deep again as the student, float32
    python benchmarks/minillm.py --quick            # the same code on a toy, for the tests
    python benchmarks/minillm.py --rounds 3 --json results.json

Every contender trains in turn, in one process, on the same prompts. A step is the mean over whole cycles, since those
that sample cost more than those that reuse. CPU seconds are those of the process alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from compare_trl import conversations, llama, word_tokenizer
from measuring import machine, medians, write_results

SIZE = {"vocab": 49152, "hidden": 256, "layers": 4, "teacher_layers": 6, "batch": 4, "length": 64, "new_tokens": 32}
SIZE |= {"steps": 16, "warmup": 0}
QUICK = {"vocab": 512, "hidden": 32, "layers": 1, "teacher_layers": 2, "length": 16, "new_tokens": 4}
PAPER = {"num_minibatches": 4, "num_inner_epochs": 4}
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GKD, lmbda 1, reverse KL": ("gkd", {"lmbda": 1.0, "divergence": "reverse_kl"}),
    "MiniLLM, sampled anew, no teacher mixed in": ("minillm", {"teacher_mix_alpha": 0.0}),
    "MiniLLM, sampled anew": ("minillm", {}),
    "MiniLLM, 4 x 4, no teacher mixed in": ("minillm", {**PAPER, "teacher_mix_alpha": 0.0}),
    "MiniLLM, 4 x 4 (the paper's)": ("minillm", PAPER),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy model and one round")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each contender, in turns")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="write all measurements here")
    options = parser.parse_args()
    size = SIZE | (QUICK if options.quick else {})
    described = f"{machine(options.threads)}\n\n{size}"
    print(f"{described}\n")
    measure("gkd", {"lmbda": 1.0}, {**size, "steps": 2}, options.threads)  # imports and first touches are nobody's cost
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, (method, settings) in CONTENDERS.items():
            results[name].append(measure(method, settings, size, options.threads))
    print(table(results))
    write_results(options.json, described, results)


def measure(method: str, settings: dict[str, Any], size: dict[str, int], threads: int) -> dict[str, float]:
    """Mean seconds per optimiser step, on the clock and of this process, from the first prompt to the last update."""
    import torch
    from datasets import Dataset
    from transformers.utils import logging

    from distill_trainers.trainers import METHODS

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    tokenizer = word_tokenizer(size["vocab"])
    prompts = Dataset.from_list([{"prompt": row["messages"][:1]} for row in conversations(size)])
    config_class, trainer_class = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            output_dir=folder,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            max_steps=size["steps"],
            per_device_train_batch_size=size["batch"],
            learning_rate=1e-5,
            max_length=size["length"] + size["new_tokens"],
            max_new_tokens=size["new_tokens"],
            **settings,
        )
        trainer: Any = trainer_class(
            llama(tokenizer, size, size["layers"], seed=1),
            llama(tokenizer, size, size["teacher_layers"], seed=2),
            args,
            prompts,
            processing_class=tokenizer,
        )
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds / size["steps"], "cpu_seconds": cpu_seconds / size["steps"]}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the rounds, and ratios to GKD."""
    found = medians(results)
    base = next(iter(found.values()))
    lines = ["| trainer | s per step | ratio | CPU s per step | ratio |", "|---|---|---|---|---|"]
    for name, got in found.items():
        cells = [f"{got[key]:.3f} | {got[key] / base[key]:.2f}" for key in ("seconds", "cpu_seconds")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
