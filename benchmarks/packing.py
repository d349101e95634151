"""What packing, and batches counted in tokens, save on rows of mixed lengths: real tokens per second, off-policy.

    python benchmarks/packing.py                    # 4096 tokens, Llama 192 x 3 with a teacher of 5 layers, float32
    python benchmarks/packing.py --quick            # the same code on a toy, for the tests
    python benchmarks/packing.py --rounds 3 --json results.json
    python benchmarks/packing.py --model ./SmolLM2-135M --rows 24 --only 1 2 3

Lengths are lognormal, as those of chats are: many short rows, few as long as `max_length`. Every contender trains over
the same rows once, in turn, in one process.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from compare_trl import llama, word_tokenizer
from measuring import machine, medians, write_results

SIZE = {"vocab": 4096, "hidden": 192, "layers": 3, "teacher_layers": 5, "rows": 96, "median": 64, "length": 384}
SIZE |= {"new_tokens": 0}
QUICK = {"vocab": 512, "hidden": 32, "layers": 1, "teacher_layers": 2, "rows": 32, "median": 12, "length": 64}
CONTENDERS: dict[str, dict[str, Any]] = {
    "batches of 8 rows": {"per_device_train_batch_size": 8},
    "batches of 8 rows, grouped by length": {
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "group_by_length",
    },
    "batches of at most 768 tokens": {"per_device_train_tokens": 768},
    "packed, batches of 2": {"per_device_train_batch_size": 2, "packing": True},
    "packed, batches of 2, eager attention": {
        "per_device_train_batch_size": 2,
        "packing": True,
        "attention": "eager",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy model and one round")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each contender, in turns")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rows", type=int, help=f"of the data, {SIZE['rows']} by default")
    parser.add_argument("--only", type=int, nargs="+", help="which contenders, by their places from 1 on")
    parser.add_argument("--model", type=Path, help="a folder of student and teacher, in place of random Llamas")
    parser.add_argument("--json", type=Path, help="write all measurements here")
    options = parser.parse_args()
    size: dict[str, Any] = SIZE | (QUICK if options.quick else {})
    size |= {"rows": options.rows} if options.rows else {}
    size |= {"model": str(options.model)} if options.model else {}
    described = f"{machine(options.threads)}\n\n{size}"
    print(f"{described}\n")
    few = {**size, "rows": 8}  # imports and first touches are nobody's cost
    measure(CONTENDERS["batches of 8 rows"], few, options.threads)
    chosen = [name for place, name in enumerate(CONTENDERS, 1) if place in (options.only or [place])]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for _ in range(options.rounds):
        for name in chosen:
            results[name].append(measure(CONTENDERS[name], size, options.threads))
    print(table(results))
    write_results(options.json, described, results)


def rows_of(size: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of random ids, three quarters of each trained."""
    draw = random.Random(0)
    lengths = [
        min(size["length"], max(8, int(draw.lognormvariate(0, 0.8) * size["median"]))) for _ in range(size["rows"])
    ]
    texts = [[draw.randrange(4, size["vocab"]) for _ in range(length)] for length in lengths]
    return [{"input_ids": ids, "labels": [-100] * (len(ids) // 4) + ids[len(ids) // 4 :]} for ids in texts]


def tokenizer_of(size: dict[str, Any]) -> Any:
    """That of the models."""
    if "model" not in size:
        return word_tokenizer(size["vocab"])
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(size["model"])


def models_of(size: dict[str, Any], tokenizer: Any) -> list[Any]:
    """Student and teacher."""
    if "model" in size:
        from transformers import AutoModelForCausalLM

        return [AutoModelForCausalLM.from_pretrained(size["model"], dtype="float32") for _ in range(2)]
    return [llama(tokenizer, size, size[layers], seed=seed) for seed, layers in ((1, "layers"), (2, "teacher_layers"))]


def measure(settings: dict[str, Any], size: dict[str, Any], threads: int) -> dict[str, float]:
    """Real tokens (without padding) per second, on the clock and of this process, over one epoch."""
    import torch
    from datasets import Dataset
    from transformers.utils import logging

    from distill_trainers import GKDConfig, GKDTrainer

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    settings = dict(settings)
    attention = settings.pop("attention", "sdpa")
    tokenizer, rows = tokenizer_of(size), rows_of(size)
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(
            output_dir=folder,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            num_train_epochs=1,
            learning_rate=1e-5,
            lmbda=0.0,
            max_length=size["length"],
            **settings,
        )
        pair = models_of(size, tokenizer)
        for model in pair:
            model.set_attn_implementation(attention)
        trainer = GKDTrainer(*pair, args, Dataset.from_list(rows), processing_class=tokenizer)
        trainer.get_train_dataloader()  # packs
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    tokens = sum(len(row["input_ids"]) for row in rows)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    trained = [log["trained_tokens"] for log in logs]
    return {
        "steps": trainer.state.global_step,
        "per_second": tokens / seconds,
        "per_cpu_second": tokens / cpu_seconds,
        "trained_per_cpu_second": sum(trained) / cpu_seconds,
        "spread": statistics.pstdev(trained) / statistics.mean(trained),
        "padding": statistics.mean(log.get("padding_share", float("nan")) for log in logs),
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the rounds, and ratios to the first."""
    found = medians(results)
    base = next(iter(found.values()))
    lines = [
        "| batches | steps | padding | trained tokens of steps, ± | trained tokens per CPU s | tokens per s | ratio | "
        "tokens per CPU s | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, got in found.items():
        padding = "not logged" if math.isnan(got["padding"]) else f"{got['padding']:.0%}"
        cells = [f"{got['steps']:.0f}", padding, f"{got['spread']:.0%}"]
        cells += [f"{got['trained_per_cpu_second']:.1f}"]
        cells += [f"{got[key]:.0f} | {got[key] / base[key]:.2f}" for key in ("per_second", "per_cpu_second")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
