"""Step time and peak memory of our GKDTrainer beside TRL's GKDTrainer and DistillationTrainer, in one run.

    python benchmarks/compare_trl.py                       # every mode, 49152 tokens, float32
    python benchmarks/compare_trl.py --quick               # the same code on a toy, for the tests
    python benchmarks/compare_trl.py --modes on-policy --rounds 1 --json results.json

Every measurement is a process of its own, so that peak memory (`ru_maxrss`) is that of one trainer, and the trainers
take turns, so that whatever else runs on the machine meets them alike. Models, data, seed, loss (JSD, beta 0.5),
optimiser and number of threads are equal. TRL's DistillationTrainer has no off-policy mode.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measuring import Meter, in_turns, machine, medians, write_results

TRAINERS = {
    "ours": "ours: GKDTrainer",
    "ours_cached": "ours: GKDTrainer, teacher's answers from a cache",
    "ours_checkpointing": "ours: GKDTrainer, activation checkpointing",
    "ours_generate": "ours: GKDTrainer, rollouts by transformers' generate",
    "trl": "TRL: GKDTrainer",
    "trl_distillation": "TRL: DistillationTrainer",
}
BOTH, ALL = ["ours", "trl"], ["ours", "trl", "trl_distillation"]
# What differs from SIZE, who takes part, and whether TRL recomputes activations, as it does by default.
SIZE = {"vocab": 49152, "hidden": 256, "layers": 4, "teacher_layers": 4, "batch": 4, "length": 128, "new_tokens": 32}
SIZE |= {"steps": 5, "warmup": 2}
DEEP = {"hidden": 576, "layers": 6, "teacher_layers": 18, "steps": 4, "warmup": 1}
LONG = {"batch": 8, "new_tokens": 128, "skewed": 1, "steps": 3, "warmup": 1}
MODES: dict[str, dict[str, Any]] = {
    "off-policy": {"trainers": BOTH},
    "off-policy, teacher three times as deep": {"size": DEEP, "trainers": ["ours", "ours_cached", "trl"]},
    "off-policy, teacher three times as deep, LoRA student": {
        "size": DEEP,
        "trainers": ["ours", "ours_cached", "trl"],
        "lora": True,
    },
    "on-policy": {"trainers": ALL, "lmbda": 1.0},
    "on-policy, skewed lengths": {"size": LONG, "trainers": ["ours", "ours_generate", *ALL[1:]], "lmbda": 1.0},
    "on-policy, skewed lengths, TRL's default settings": {
        "size": LONG,
        "trainers": ["ours", "ours_checkpointing", "trl", "trl_distillation"],
        "lmbda": 1.0,
        "trl_checkpointing": True,
    },
}
QUICK = {"vocab": 2048, "hidden": 32, "layers": 1, "teacher_layers": 3, "length": 32, "new_tokens": 4, "steps": 5}
QUICK |= {"warmup": 1}
# In the short run each shows one thing: the loss, the cache, and rollouts.
SHORT = ["off-policy", "off-policy, teacher three times as deep", "on-policy, skewed lengths"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy model and one round")
    parser.add_argument("--short", action="store_true", help="three of the modes, one round")
    parser.add_argument("--rounds", type=int, default=None, help="processes per trainer and mode (3; quick, short: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 is the steadiest on a shared machine")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), help="by default all")
    parser.add_argument("--json", type=Path, help="write all measurements here")
    parser.add_argument("--only", nargs=2, metavar=("TRAINER", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(*options.only, options)))
        return
    rounds = options.rounds or (1 if options.quick or options.short else 3)
    described = f"{machine(options.threads, options.device)}\n\n{settings_line(rounds)}"
    print(f"{described}\n")
    results = {}
    for mode in options.modes or (SHORT if options.short else MODES):
        results[mode] = in_turns(__file__, MODES[mode]["trainers"], rounds, [mode])
        print(table(mode, size_of(mode, options.quick), results[mode]), flush=True)
        write_results(options.json, described, results)


def size_of(mode: str, quick: bool) -> dict[str, int]:
    return SIZE | MODES[mode].get("size", {}) | (QUICK if quick else {})


def measure(name: str, mode: str, options: argparse.Namespace) -> dict[str, float]:
    """Train in this process: median seconds per step on the clock and of this process, extra peak MiB, first loss.

    The extra memory is the peak over what was held when training began: models are not in it.
    """
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    size = size_of(mode, options.quick)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(name, MODES[mode], {**size, "on_gpu": options.device == "cuda"}, folder)
        meter, ends = Meter(options.device), []

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append(meter.now())

        trainer.add_callback(Clock())
        trainer.train()
        extra = meter.extra_mib()
    # From end to end: rollouts happen before the step begins here, and inside it in TRL.
    pairs = list(zip(ends, ends[1:], strict=False))[size["warmup"] - 1 :]
    seconds, cpu_seconds = (statistics.median(after[i] - before[i] for before, after in pairs) for i in (0, 1))
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_mib": extra, "loss": loss, "steps": len(pairs)}


def build(name: str, mode: dict[str, Any], size: dict[str, int], folder: str, filling: bool = False) -> Any:
    from datasets import Dataset

    tokenizer, rows = word_tokenizer(size["vocab"]), conversations(size)
    teacher = llama(tokenizer, size, size["teacher_layers"], seed=2)
    models: dict[str, Any] = {"model": llama(tokenizer, size, size["layers"], seed=1), "teacher_model": teacher}
    models["processing_class"] = tokenizer
    if mode.get("lora"):
        from peft import LoraConfig

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        models["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    checkpointing = mode.get("trl_checkpointing", False) if name.startswith("trl") else name == "ours_checkpointing"
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": not size.get("on_gpu"),
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": size["warmup"] + size["steps"],
        "per_device_train_batch_size": size["batch"],
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "activation_checkpointing": checkpointing,
        "temperature": 1.0,
        "beta": 0.5,
    }
    if name == "trl_distillation":
        from trl import DistillationConfig, DistillationTrainer

        prompts = Dataset.from_list([{"prompt": row["messages"][:1]} for row in rows])
        args = DistillationConfig(**settings, bf16=False, max_completion_length=size["new_tokens"])
        return DistillationTrainer(**models, args=args, train_dataset=prompts)
    settings |= {"lmbda": mode.get("lmbda", 0.0), "max_new_tokens": size["new_tokens"], "max_length": context(size)}
    if name == "trl":
        from trl.experimental.gkd import GKDConfig as TrlConfig
        from trl.experimental.gkd import GKDTrainer as TrlTrainer

        args = TrlConfig(**settings, bf16=False)
        return TrlTrainer(**models, args=args, train_dataset=Dataset.from_list(rows))
    from distill_trainers import CachedTeacher, GKDConfig, GKDTrainer
    from distill_trainers.trainers.lifecycle.cache_filling import fill_cache

    if name == "ours_generate":
        settings["rollout_engine"] = "hf"
    cache = os.path.join(folder, "cache")
    if filling:
        settings["teacher_cache"] = cache
    elif name == "ours_cached":
        # In a process of its own: the peak of this one shall be that of training from the cache.
        filler = multiprocessing.get_context("spawn").Process(target=build, args=(name, mode, size, folder, True))
        filler.start()
        filler.join()
        models["teacher_model"] = CachedTeacher(cache)
        del teacher
    trainer = GKDTrainer(**models, args=GKDConfig(**settings), train_dataset=Dataset.from_list(rows))
    if filling:
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
    for _ in range(size["batch"] * (size["warmup"] + size["steps"])):
        words = [f"w{draw.randrange(2, size['vocab'])}" for _ in range(length)]
        cut = draw.randint(3 * length // 8, 5 * length // 8)
        parts = (("user", words[:cut]), ("assistant", words[cut:]))
        rows.append({"messages": [{"role": role, "content": " ".join(part)} for role, part in parts]})
    return rows


def context(size: dict[str, int]) -> int:
    return size["length"] + max(size["length"], size["new_tokens"])


def llama(tokenizer: Any, size: dict[str, int], layers: int, seed: int) -> Any:
    """A Llama of random weights; `skewed`: completions end after each token with probability 4 / new tokens."""
    import torch

    from distill_trainers.toy import tiny_llama

    if not size.get("skewed"):
        return tiny_llama(tokenizer, size["hidden"], layers, seed=seed, max_position_embeddings=context(size))
    separate = {"tie_word_embeddings": False, "initializer_range": 0.02}
    model = tiny_llama(tokenizer, size["hidden"], layers, seed=seed, max_position_embeddings=context(size), **separate)
    # A large constant in the residual stream is a bias of about sqrt(hidden) behind the last norm.
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        wanted = math.log(size["vocab"] * 4 / size["new_tokens"])
        model.lm_head.weight[tokenizer.eos_token_id, 0] = wanted / math.sqrt(size["hidden"])
    return model


def table(mode: str, size: dict[str, int], results: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the processes, the range of step times, and ratios to ours."""
    lines = [
        f"**{mode}** ({size_line(size)})\n",
        "| trainer | s per step (range) | ratio | CPU s per step | ratio | extra peak MiB | ratio | loss of step 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    middle = medians(results)
    for name, got in middle.items():
        seconds = [run["seconds"] for run in results[name]]
        ratios = {key: got[key] / middle["ours"][key] for key in ("seconds", "cpu_seconds", "extra_mib")}
        spread = f"{min(seconds):.3f}–{max(seconds):.3f}"
        lines.append(
            f"| {TRAINERS[name]} | {got['seconds']:.3f} ({spread}) | {ratios['seconds']:.2f} "
            f"| {got['cpu_seconds']:.3f} | {ratios['cpu_seconds']:.2f} "
            f"| {got['extra_mib']:.0f} | {ratios['extra_mib']:.2f} | {got['loss']:.6g} |"
        )
    return "\n".join(lines) + "\n"


def size_line(size: dict[str, int]) -> str:
    skewed = ", most of them ended early" if size.get("skewed") else ""
    return (
        f"Llama {size['hidden']} x {size['layers']}, teacher x {size['teacher_layers']}, {size['vocab']} tokens; "
        f"{size['batch']} rows of {size['length']} tokens, about half prompt; on-policy at most {size['new_tokens']} "
        f"new tokens{skewed}; median of {size['steps']} steps after {size['warmup']}"
    )


def settings_line(rounds: int) -> str:
    return f"Random weights, float32; medians over {rounds} process(es) per trainer, which take turns."


if __name__ == "__main__":
    main()
