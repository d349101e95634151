"""Drafts for speculative sampling: what `generate(assistant_model=…)` accepts beside Σ min(p, q), before and after.

    python benchmarks/draft.py --teacher runs/demo/teacher --work runs/draft --seconds 150 --seeds 0 1 2

A draft keeps some of the teacher's layers, and trains until so many seconds of CPU time are over, by forward KL or by
`lk`: on the teacher's answers, made before, and in a share λ of the steps on its own text. Then the teacher answers
held-out prompts with the draft's help, by transformers' own rule at temperature 1. A draft at a place is accepted with
probability α = Σ min(p, q), whatever was accepted before: so the number accepted is Σ α over the places tried, give or
take 1.96 √(Σ α (1 − α)). α is what `acceptance` measures of the finished text, read anew in one forward.

What is made once is not counted: answers, the untrained draft. What training samples is. A stopped run goes on: what is
done lies in `--work`, one `done.json` for each contender, seed and step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from measuring import keep_settings, machine, write_results
from methods import RECIPES, SHORT, conversations, rows_of, sampled, user
from pruning import train_for

CONTENDERS: dict[str, dict[str, Any]] = {
    "forward_kl": {"divergence": "forward_kl"},
    "lk": {"divergence": "lk"},
    "lk 0.1": {"divergence": "lk", "kl_weight": 0.1},
    "total_variation": {"divergence": "total_variation"},
}
BEFORE = "before"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--work", type=Path, default=Path("runs/draft"), help="folder for everything made")
    parser.add_argument("--keep-layers", type=int, default=10, help="of the draft, spaced evenly")
    parser.add_argument("--seconds", type=float, default=150, help="of CPU time for training, for each")
    parser.add_argument("--lmbda", type=float, default=0.25, help="share of steps on the draft's own text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data order and sampling")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=["forward_kl", "lk", "lk 0.1"])
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--drafted", type=int, default=3, help="k: tokens drafted at once")
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts that are answered with a draft")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each such answer, at most")
    parser.add_argument("--quick", action="store_true", help="a toy teacher, few prompts: only shows that it runs")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = arguments().parse_args()
    if options.only:
        work(*options.only, options)
        return
    keep_settings(options)
    for name, seed in runs(options):
        if not all(done_file(step, name, seed, options).is_file() for step in steps_of(name)):
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name, str(seed)]
            subprocess.run(command, check=True)
    described = f"{machine(1)}\n\n{settings_line(options)}"
    results = summary(options)
    print(f"{described}\n\n{table(results)}")
    write_results(options.json, described, results)


def runs(options: argparse.Namespace) -> list[tuple[str, int]]:
    return [(BEFORE, 0), *((name, seed) for seed in options.seeds for name in options.contenders)]


def steps_of(name: str) -> dict[str, Any]:
    return {"prepare": prepare, "measure": measure} if name == BEFORE else {"train": train, "measure": measure}


def done_file(step: str, name: str, seed: int, options: argparse.Namespace) -> Path:
    return options.work / name.replace(" ", "-") / str(seed) / step / "done.json"


def work(name: str, seed: str, options: argparse.Namespace) -> None:
    """One process for each draft: make or train it, and measure; a step with a `done.json` is complete."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for step, doing in steps_of(name).items():
        file = done_file(step, name, int(seed), options)
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            done = doing(name, int(seed), options)
            file.write_text(json.dumps(done) + "\n")
            print(step, name, seed, done, flush=True)


# ---- Text and draft --------------------------------------------------------------------------------------------------


def prepare(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The teacher's answers to every prompt, sampled at temperature 1; the untrained draft."""
    from transformers import AutoTokenizer

    from distill_trainers.models import load_causal_lm, num_parameters
    from distill_trainers.students import prune

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = load_causal_lm(options.teacher, dtype="float32").eval()
    for part, limit in (("train", 16), ("heldout", 4)):
        if (options.work / f"{part}.jsonl").is_file():
            continue
        lines = (RECIPES / f"prompts_{part}.jsonl").read_text(encoding="utf-8").splitlines()
        lines = lines[: limit if options.quick else None]
        prompts = [json.loads(line)["prompt"][-1]["content"] + SHORT for line in lines]
        answers = sampled(teacher, tokenizer, prompts, options, 1.0)
        made = [{"question": q, "answer": a} for q, a in zip(prompts, answers, strict=True) if a]
        (options.work / f"{part}.jsonl").write_text("\n".join(map(json.dumps, made)) + "\n", encoding="utf-8")
    draft = prune(teacher, keep_layers=options.keep_layers)
    draft.save_pretrained(draft_of(BEFORE, 0, options))
    return {"parameters": num_parameters(draft), "teacher_parameters": num_parameters(teacher)}


def draft_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    return done_file("prepare" if name == BEFORE else "train", name, seed, options).parent / "draft"


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train until the CPU time is over, and save the draft."""
    trainer = build(draft_of(BEFORE, 0, options), CONTENDERS[name], seed, options)
    spent = train_for(trainer, options)
    trainer.model.save_pretrained(draft_of(name, seed, options))
    return {"steps": trainer.state.global_step, "cpu_seconds": spent}


def build(draft: Path, divergence: dict[str, Any], seed: int, options: argparse.Namespace) -> Any:
    """A trainer of the draft; its evaluation reads the teacher's answers to the held-out prompts."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill_trainers import GKDConfig, GKDTrainer

    held_out = [
        {"messages": [user(row["question"]), {"role": "assistant", "content": row["answer"]}]}
        for row in rows_of("heldout", options)
    ]
    args = GKDConfig(
        output_dir=str(options.work / "runs"),
        lmbda=options.lmbda,
        **divergence,
        max_length=512,  # longer than any row
        max_new_tokens=4 if options.quick else 64,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_steps=100_000,
        max_grad_norm=1.0,
        weight_decay=0.0,
        use_cpu=True,
        bf16=False,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
    )
    return GKDTrainer(
        AutoModelForCausalLM.from_pretrained(draft, dtype="float32"),
        options.teacher,
        args,
        train_dataset=Dataset.from_list(conversations(options)),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=AutoTokenizer.from_pretrained(options.teacher),
    )


# ---- Speculative sampling --------------------------------------------------------------------------------------------


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Answer held-out prompts with and without the draft; read what was written, and the teacher's own answers."""
    from distill_trainers.evaluation.teacher_forced import force, pair_runner

    trainer = build(draft_of(name, seed, options), {}, 0, options)
    draft, teacher, tokenizer = trainer.model.eval(), trainer.teacher.model, trainer.processing_class
    asked = [
        tokenizer.apply_chat_template([user(row["question"])], add_generation_prompt=True, return_dict=False)
        for row in rows_of("heldout", options)[: options.prompts]
    ]
    helped = written(teacher, asked, options, draft)
    plain = written(teacher, asked, options, None)
    texts = [(ids, text) for ids, text in zip(asked, helped["texts"], strict=True)]
    run = pair_runner(type(trainer.teacher)(draft), trainer.teacher, None, None)
    read = force(texts, run, pad_token_id=tokenizer.pad_token_id, device=draft.device, batch_size=8, progress=False)
    found = trainer.evaluate()
    scores = {key: found[f"eval_{key}"] for key in ("kl", "acceptance", "top1_agreement")}
    rates = {"tokens_per_second": helped["rate"], "plain_tokens_per_second": plain["rate"]}
    counts = {key: helped[key] for key in ("tokens", "rounds")}
    return {**scores, **counted(helped["tried"], [row["acceptance"] for row in read]), **counts, **rates}


def counted(tried: list[list[tuple[int, bool]]], alphas: list[list[float]]) -> dict[str, Any]:
    """Compare how many drafts were accepted with Σ min(p, q) at the same places.

    Args:
        tried: by text, the place in the completion of each draft that was tried, and whether it was accepted.
        alphas: by text, Σ min(p, q) of every token of the completion.
    """
    places = [(alphas[i][place], accepted) for i, text in enumerate(tried) for place, accepted in text]
    number, expected = len(places), sum(alpha for alpha, _ in places)
    deviation = math.sqrt(sum(alpha * (1 - alpha) for alpha, _ in places))
    accepted = sum(accepted for _, accepted in places)
    return {
        "tried": number,
        "accepted": accepted / number,
        "expected": expected / number,
        "half_interval": 1.96 * deviation / number,
        "deviations": (accepted - expected) / deviation if deviation else 0.0,
    }


def written(teacher: Any, prompts: list[list[int]], options: argparse.Namespace, draft: Any | None) -> dict[str, Any]:
    """Complete the prompts one by one at temperature 1, and time it."""
    import torch

    torch.manual_seed(0)
    how: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    how |= {"max_new_tokens": options.new_tokens}
    if draft is not None:
        how["assistant_model"] = draft
        config = draft.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = options.drafted, "constant"
        config.assistant_confidence_threshold = 0.0  # a draft is tried whatever the draft model thinks of it
    texts, tried, rounds, seconds = [], [], 0, 0.0
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with speculations() as made:
            started = time.process_time()
            out = teacher.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
            seconds += time.process_time() - started
        texts.append(out[0, len(prompt) :].tolist())
        tried.append(places_tried(made, len(prompt)))
        rounds += len(made)
    number = sum(map(len, texts))
    return {"texts": texts, "tried": tried, "tokens": number, "rounds": rounds, "rate": number / seconds}


@contextmanager
def speculations() -> Any:
    """Collect (length of the text before, drafts, drafts accepted) of each round of transformers' speculation."""
    from transformers.generation import utils

    made: list[tuple[int, int, int]] = []
    plain = utils._speculative_sampling

    def recorded(candidates: Any, logits: Any, length: int, *args: Any, **kwargs: Any) -> Any:
        tokens, matches = plain(candidates, logits, length, *args, **kwargs)
        made.append((candidates.shape[1] - length, length, int(matches)))
        return tokens, matches

    with mock.patch.object(utils, "_speculative_sampling", recorded):
        yield made


def places_tried(made: list[tuple[int, int, int]], prompt: int) -> list[tuple[int, bool]]:
    """Places in the completion at which a draft was tried, and whether it was accepted: none behind a rejection."""
    places = []
    for before, drafts, accepted in made:
        start = before - prompt
        places += [(start + i, i < accepted) for i in range(min(drafts, accepted + 1))]
    return places


# ---- Results ---------------------------------------------------------------------------------------------------------


def summary(options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, seed in runs(options):
        done: dict[str, Any] = {}
        for step in steps_of(name):
            done |= json.loads(done_file(step, name, seed, options).read_text())
        results.setdefault(name, []).append({"seed": seed, **done})
    return results


def table(results: dict[str, Any]) -> str:
    heads = ["draft", "KL", "Σ min(p, q) on the teacher's answers", "accepted / Σ min(p, q), with the draft"]
    heads += ["tokens a forward of the teacher", "tokens/s ÷ without", "steps"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, done in results.items():
        mean = lambda key, done=done: statistics.mean(run[key] for run in done)  # noqa: E731
        measured = ", ".join(f"{r['accepted']:.3f} / {r['expected']:.3f} ± {r['half_interval']:.3f}" for r in done)
        faster = statistics.mean(run["tokens_per_second"] / run["plain_tokens_per_second"] for run in done)
        steps = f"{mean('steps'):.0f}" if "steps" in done[0] else ""
        each = statistics.mean(run["tokens"] / run["rounds"] for run in done)
        cells = [name, f"{mean('kl'):.3f}", ", ".join(f"{r['acceptance']:.3f}" for r in done), measured]
        lines.append(f"| {' | '.join([*cells, f'{each:.2f}', f'{faster:.2f}', steps])} |")
    return "\n".join(lines)


def settings_line(options: argparse.Namespace) -> str:
    return (
        f"{Path(options.teacher).name}: {options.keep_layers} of its layers; {options.seconds:.0f} s of CPU time each, "
        f"one thread, float32; batch 4, λ = {options.lmbda:g}, learning rate {options.learning_rate:g} falling to 0 "
        f"with the time; {options.prompts} held-out prompts, {options.drafted} drafts at once."
    )


if __name__ == "__main__":
    main()
