"""Step time and peak memory of our GKDTrainer beside TRL's GKDTrainer and DistillationTrainer, in one run.

    python benchmarks/compare_trl.py            # a Llama of 256 x 4 with 49152 tokens, batch 4 x 128, float32
    python benchmarks/compare_trl.py --quick    # the same code on a toy, for the tests

Every measurement is a process of its own, so that peak memory (`ru_maxrss`) is that of one trainer, and the trainers
take turns, so that whatever else runs on the machine meets them alike. Models, data, seed, loss (JSD, beta 0.5),
optimiser and number of threads are equal. TRL's DistillationTrainer has no off-policy mode.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TRAINERS = {"ours": "ours: GKDTrainer", "trl": "TRL: GKDTrainer", "trl_distillation": "TRL: DistillationTrainer"}
MODES = {
    "off-policy": {"lmbda": 0.0},
    "off-policy, ours with the teacher's answers from a cache": {"lmbda": 0.0, "cached": True},
    "on-policy": {"lmbda": 1.0},
    "on-policy, activation checkpointing": {"lmbda": 1.0, "activation_checkpointing": True},
}
FULL = {"vocab": 49152, "hidden": 256, "layers": 4, "length": 128, "new_tokens": 32, "steps": 5, "warmup": 2}
QUICK = {"vocab": 2048, "hidden": 32, "layers": 1, "length": 32, "new_tokens": 4, "steps": 5, "warmup": 1}
BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy model and one round")
    parser.add_argument("--rounds", type=int, default=None, help="processes per trainer and mode (3; quick: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 is the steadiest on a shared machine")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--only", nargs=2, metavar=("TRAINER", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    if options.only:
        print(json.dumps(measure(*options.only, size, options.threads)))
        return
    rounds = options.rounds or (1 if options.quick else 3)
    print(f"{machine(options.threads)}\n\n{settings_line(size, rounds)}\n")
    for mode in options.modes:
        print(table(mode, compare(mode, rounds, options.threads, options.quick)), flush=True)


def compare(mode: str, rounds: int, threads: int, quick: bool) -> dict[str, list[dict[str, float]]]:
    """Results of every process, by trainer; the trainers take turns and each round starts with another one."""
    names = [name for name in TRAINERS if name != "trl_distillation" or MODES[mode]["lmbda"]]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            command = [sys.executable, __file__, "--threads", str(threads), "--only", name, mode]
            command += ["--quick"] if quick else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}, {mode} failed:\n{done.stderr[-3000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  {mode} {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    return results


def measure(name: str, mode: str, size: dict[str, int], threads: int) -> dict[str, float]:
    """Train in this process: median seconds per step on the clock and of this process, extra peak MiB, first loss.

    The extra memory is the peak over what was held when training began: models are not in it.
    """
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(name, MODES[mode], size, folder)
        ends: list[tuple[float, float]] = []

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append((time.perf_counter(), time.process_time()))

        trainer.add_callback(Clock())
        held = resident_mib()
        trainer.train()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # From end to end: rollouts happen before the step begins here, and inside it in TRL.
    pairs = list(zip(ends, ends[1:], strict=False))[size["warmup"] - 1 :]
    seconds, cpu_seconds = (statistics.median(after[i] - before[i] for before, after in pairs) for i in (0, 1))
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_mib": peak - held, "loss": loss, "steps": len(pairs)}


def build(name: str, mode: dict[str, Any], size: dict[str, int], folder: str) -> Any:
    tokenizer, rows = word_tokenizer(size["vocab"]), conversations(size)
    student, teacher = llama(tokenizer, size, seed=1), llama(tokenizer, size, seed=2)
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": size["warmup"] + size["steps"],
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "activation_checkpointing": mode.get("activation_checkpointing", False),
        "temperature": 1.0,
        "beta": 0.5,
    }
    from datasets import Dataset

    models = {"model": student, "teacher_model": teacher, "processing_class": tokenizer}
    if name == "trl_distillation":
        from trl import DistillationConfig, DistillationTrainer

        prompts = Dataset.from_list([{"prompt": row["messages"][:1]} for row in rows])
        args = DistillationConfig(**settings, bf16=False, max_completion_length=size["new_tokens"])
        return DistillationTrainer(**models, args=args, train_dataset=prompts)
    settings |= {"lmbda": mode["lmbda"], "max_new_tokens": size["new_tokens"], "max_length": 2 * size["length"]}
    if name == "trl":
        from trl.experimental.gkd import GKDConfig as TrlConfig
        from trl.experimental.gkd import GKDTrainer as TrlTrainer

        args = TrlConfig(**settings, bf16=False)
        return TrlTrainer(**models, args=args, train_dataset=Dataset.from_list(rows))
    from distill_trainers import CachedTeacher, GKDConfig, GKDTrainer
    from distill_trainers.trainers.caching import fill_cache

    cache = os.path.join(folder, "cache")
    if mode.get("filling"):
        settings["teacher_cache"] = cache
    elif mode.get("cached"):
        # In a process of its own: the peak of this one shall be that of training from the cache.
        filler = multiprocessing.get_context("spawn").Process(
            target=build, args=(name, {**mode, "filling": True}, size, folder)
        )
        filler.start()
        filler.join()
        models["teacher_model"] = CachedTeacher(cache)
    trainer = GKDTrainer(**models, args=GKDConfig(**settings), train_dataset=Dataset.from_list(rows))
    if mode.get("filling"):
        fill_cache(trainer)
    return trainer


def word_tokenizer(vocab: int) -> Any:
    """One word, one token: `w2 w3 ...`, so that lengths are known without a trained tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + (' <eos>' if m['role'] == 'assistant' else ' ') }}{% endfor %}"
    )
    return tokenizer


def conversations(size: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of `length` tokens and an EOS, of which the prompt has between 3/8 and 5/8."""
    draw, length = random.Random(0), size["length"]
    rows = []
    for _ in range(BATCH * (size["warmup"] + size["steps"])):
        words = [f"w{draw.randrange(2, size['vocab'])}" for _ in range(length)]
        cut = draw.randint(3 * length // 8, 5 * length // 8)
        parts = (("user", words[:cut]), ("assistant", words[cut:]))
        rows.append({"messages": [{"role": role, "content": " ".join(part)} for role, part in parts]})
    return rows


def llama(tokenizer: Any, size: dict[str, int], seed: int) -> Any:
    from distill_trainers.data.addition import tiny_llama

    return tiny_llama(tokenizer, size["hidden"], size["layers"], seed=seed, max_position_embeddings=2 * size["length"])


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def table(mode: str, results: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the processes, the range of step times, and ratios to ours."""
    lines = [
        f"**{mode}**\n",
        "| trainer | s per step (range) | ratio | CPU s per step | ratio | extra peak MiB | ratio | loss of step 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    for name, got in medians.items():
        seconds = [run["seconds"] for run in results[name]]
        ratios = {key: got[key] / medians["ours"][key] for key in ("seconds", "cpu_seconds", "extra_mib")}
        spread = f"{min(seconds):.3f}–{max(seconds):.3f}"
        lines.append(
            f"| {TRAINERS[name]} | {got['seconds']:.3f} ({spread}) | {ratios['seconds']:.2f} "
            f"| {got['cpu_seconds']:.3f} | {ratios['cpu_seconds']:.2f} "
            f"| {got['extra_mib']:.0f} | {ratios['extra_mib']:.2f} | {got['loss']:.6g} |"
        )
    return "\n".join(lines) + "\n"


def machine(threads: int) -> str:
    import torch
    import transformers
    import trl

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return (
        f"{platform.platform()}, {cpu}, {os.cpu_count()} cores, {threads} thread(s), Python "
        f"{platform.python_version()}, {versions}; load average at the start {load}."
    )


def settings_line(size: dict[str, int], rounds: int) -> str:
    return (
        f"Llama {size['hidden']} x {size['layers']}, {size['vocab']} tokens, student and teacher alike, float32; batch "
        f"{BATCH} x {size['length']} tokens, about half of it prompt; {size['new_tokens']} new tokens on-policy; "
        f"median of {size['steps']} steps after {size['warmup']}, then over {rounds} process(es) that take turns."
    )


if __name__ == "__main__":
    main()
