"""Size against KL: students of one teacher pruned by depth, by width, by both, and by the planner; equal training.

    python benchmarks/pruning.py --teacher runs/demo/teacher --work runs/pruning --seconds 150 --seeds 0 1 2

For each size every contender is pruned by importance measured on the same of the teacher's answers, judged on its
answers to held-out prompts, trained by forward KL until so many seconds of CPU time are over, and judged again. What is
made once is not counted: answers, students, the teacher's distributions (a cache). Seeds are of the data's order. A
stopped run goes on: what is done lies in `--work`, one `done.json` for each contender and seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import keep_settings, machine, write_results
from methods import RECIPES, SHORT, conversations, rows_of, sampled, user

# By size in millions: of SmolLM2-135M's 30 layers with 1,536 units; what is asked of the planner is a number alone.
STUDENTS: dict[str, dict[str, Any]] = {
    "99 depth": {"keep_layers": 20},
    "99 width": {"intermediate_size": 848},
    "99 both": {"keep_layers": 26, "intermediate_size": 1056},
    "99 planned": {"parameters": 99e6},
    "109 depth": {"keep_layers": 23},
    "109 width": {"intermediate_size": 1040},
    "109 both": {"keep_layers": 26, "intermediate_size": 1280},
    "109 planned": {"parameters": 109e6},
}
QUICK = {"1 depth": {"keep_layers": 1}, "1 width": {"intermediate_size": 24}, "1 planned": {"parameters": 0.8}}
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"), help="folder for everything made")
    parser.add_argument("--seconds", type=float, default=150, help="of CPU time for training, for each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batches", type=int, default=1, help=f"of {BATCH} rows, on which importance is measured")
    parser.add_argument("--contenders", nargs="+", help="by name, such as '99 depth'; by default all")
    parser.add_argument("--quick", action="store_true", help="a toy teacher, few prompts: only shows that it runs")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="write the curve here: size against KL (needs matplotlib)")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.students = QUICK if options.quick else STUDENTS
    if options.only:
        work(*options.only, options)
        return
    keep_settings(options)
    names = options.contenders or list(options.students)
    for name in ("prepare", *(f"prune {name}" for name in names)):
        alone(name, 0, options)
    for seed in options.seeds:
        for name in names:
            alone(name, seed, options)
    described = f"{machine(1)}\n\n{settings_line(options)}"
    results = summary(names, options)
    print(f"{described}\n\n{table(results)}")
    write_results(options.json, described, results)
    if options.plot:
        plot(results, options)


def alone(name: str, seed: int, options: argparse.Namespace) -> None:
    if not done_file(name, seed, options).is_file():
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name, str(seed)], check=True)


def done_file(name: str, seed: int | str, options: argparse.Namespace) -> Path:
    return options.work / name.replace(" ", "-") / str(seed) / "done.json"


def work(name: str, seed: str, options: argparse.Namespace) -> None:
    """One process: prepare, prune, or train one contender with one seed; `done.json` says that it is complete."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = done_file(name, seed, options)
    file.parent.mkdir(parents=True, exist_ok=True)
    if name == "prepare":
        done = prepare(options)
    elif name.startswith("prune "):
        done = make(name.removeprefix("prune "), options)
    else:
        done = train(name, int(seed), options)
    file.write_text(json.dumps(done) + "\n")
    print(name, seed, done, flush=True)


# ---- What all share --------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """The teacher's answers to every prompt, sampled at temperature 1, and its distributions on them; what matters."""
    from transformers import AutoTokenizer

    from distill_trainers.models import load_causal_lm
    from distill_trainers.students import layer_importance, width_importance
    from distill_trainers.trainers.lifecycle.cache_filling import fill_cache

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = load_causal_lm(options.teacher, dtype="float32").eval()
    counts = write_answers(teacher, tokenizer, options)
    started = time.process_time()
    if not (options.work / "importance.json").is_file():
        importance = width_importance(teacher, batches(tokenizer, options))
        importance.layers = layer_importance(teacher, batches(tokenizer, options))
        counts["importance_seconds"] = time.process_time() - started
        (options.work / "importance.json").write_text(json.dumps(importance.rounded()))
    fill_cache(build(teacher, 0, options))
    return counts


def write_answers(teacher: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The teacher's answers to the prompts of the recipe, which are `train.jsonl` and `heldout.jsonl`."""
    counts: dict[str, Any] = {}
    for part, limit in (("train", 16), ("heldout", 4)):
        if (options.work / f"{part}.jsonl").is_file():
            continue
        lines = (RECIPES / f"prompts_{part}.jsonl").read_text(encoding="utf-8").splitlines()
        lines = lines[: limit if options.quick else None]
        prompts = [json.loads(line)["prompt"][-1]["content"] + SHORT for line in lines]
        answers = sampled(teacher, tokenizer, prompts, options, 1.0)
        made = [{"question": q, "answer": a} for q, a in zip(prompts, answers, strict=True) if a]
        (options.work / f"{part}.jsonl").write_text("\n".join(map(json.dumps, made)) + "\n", encoding="utf-8")
        counts[f"{part}_rows"] = len(made)
    return counts


def batches(tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    ids = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in conversations(options)]
    found = []
    for start in range(0, options.batches * BATCH, BATCH):
        rows = ids[start : start + BATCH]
        width = max(map(len, rows))
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        found.append({"input_ids": padded, "attention_mask": mask})
    return found


def make(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One untrained student, in `students/NAME`."""
    from transformers import AutoTokenizer

    from distill_trainers.models import load_causal_lm, num_parameters
    from distill_trainers.students import Importance, choose, take

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = load_causal_lm(options.teacher, dtype="float32")
    sizes = dict(options.students[name])
    if options.quick and "parameters" in sizes:
        sizes["parameters"] *= num_parameters(teacher)
    keep, parameters = sizes.pop("keep_layers", None), sizes.pop("parameters", None)
    importance = Importance(**json.loads((options.work / "importance.json").read_text()))
    started, text = time.process_time(), batches(tokenizer, options)
    choice = choose(
        teacher,
        keep_layers=keep,
        sizes=sizes,
        parameters=parameters,
        batches=text,
        importance=importance,
        told=lambda candidate: print("  ", candidate, flush=True),
    )
    seconds = time.process_time() - started
    student = take(teacher, choice)
    folder = options.work / "students" / name.replace(" ", "-")
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shape = str(choice.shape or f"{student.config.num_hidden_layers} layers")
    planned = [[str(candidate.shape), candidate.parameters, candidate.kl] for candidate in choice.candidates]
    told = {"parameters": num_parameters(student), "shape": shape, "choice_seconds": seconds, "candidates": planned}
    return told | {"kl": build(student, 0, options).evaluate()["eval_kl"]}


# ---- One training ----------------------------------------------------------------------------------------------------


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    folder = options.work / "students" / name.replace(" ", "-")
    return train_and_judge(build(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), seed, options), options)


def train_for(trainer: Any, options: argparse.Namespace) -> float:
    """Train until the CPU time is over; return what was spent."""
    from transformers import TrainerCallback

    class Budget(TrainerCallback):
        """Ends training when its CPU time is over; until then the learning rate falls with it."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.process_time()

        @property
        def spent(self) -> float:
            return time.process_time() - self.begun

        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            warm = min(1.0, (state.global_step + 1) / 3)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * warm * max(0.0, 1 - self.spent / options.seconds)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = self.spent + 0.5 * self.spent / state.global_step > options.seconds

    budget = Budget()
    trainer.add_callback(budget)
    trainer.get_train_dataloader()  # what it prepares of its rows is not counted
    trainer.train()
    return budget.spent


def train_and_judge(trainer: Any, options: argparse.Namespace) -> dict[str, float]:
    """Train until the CPU time is over, and judge."""
    spent = train_for(trainer, options)
    found = trainer.evaluate()
    names = ("eval_kl", "eval_top1_agreement", "eval_perplexity")
    scores = {key.removeprefix("eval_"): found[key] for key in names}
    return {"steps": trainer.state.global_step, "cpu_seconds": spent, **scores}


def build(student: Any, seed: int, options: argparse.Namespace, **settings: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer

    from distill_trainers import GKDConfig, GKDTrainer

    held_out = [
        {"messages": [user(row["question"]), {"role": "assistant", "content": row["answer"]}]}
        for row in rows_of("heldout", options)
    ]
    args = GKDConfig(
        output_dir=str(options.work / "runs"),
        teacher_cache=None if settings.get("hidden_weight") else str(options.work / "cache"),
        lmbda=0.0,
        divergence="forward_kl",
        max_length=512,  # longer than any row
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_steps=100_000,
        max_grad_norm=1.0,
        weight_decay=0.0,
        use_cpu=True,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        **settings,
    )
    return GKDTrainer(
        student,
        options.teacher,
        args,
        train_dataset=Dataset.from_list(conversations(options)),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=AutoTokenizer.from_pretrained(options.teacher),
    )


# ---- Results ---------------------------------------------------------------------------------------------------------


def summary(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in names:
        start = json.loads(done_file(f"prune {name}", 0, options).read_text())
        runs = [json.loads(done_file(name, seed, options).read_text()) for seed in options.seeds]
        results[name] = {**start, "runs": runs, "after": statistics.mean(run["kl"] for run in runs)}
    return results


def table(results: dict[str, Any]) -> str:
    lines = ["| student | shape | parameters | KL before | after, each seed | mean | steps |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, got in results.items():
        each = ", ".join(f"{run['kl']:.3f}" for run in got["runs"])
        steps = statistics.mean(run["steps"] for run in got["runs"])
        lines.append(
            f"| {name} | {got['shape']} | {got['parameters'] / 1e6:.1f} M | {got['kl']:.3f} | {each} "
            f"| {got['after']:.3f} | {steps:.0f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Size against KL before and after training, a line for each way of pruning."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from distill_trainers.cards.plots import save_figure

    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    ways = dict.fromkeys(name.split(maxsplit=1)[1] for name in results)
    for color, way in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], ways, strict=False):
        points = sorted((got["parameters"] / 1e6, got) for name, got in results.items() if name.endswith(f" {way}"))
        sizes = [size for size, _ in points]
        axis.plot(sizes, [got["kl"] for _, got in points], "o--", color=color, alpha=0.5, label=f"{way}: pruned")
        axis.plot(sizes, [got["after"] for _, got in points], "o-", color=color, label=f"{way}: trained")
        for size, got in points:
            axis.plot([size] * len(got["runs"]), [run["kl"] for run in got["runs"]], ".", color=color)
    axis.set(xlabel="million parameters", ylabel="held-out KL to the teacher, nats per token", ylim=(0, None))
    axis.set_title(f"{options.seconds:.0f} s of CPU time each", fontsize=10)
    axis.legend(fontsize=8)
    save_figure(figure, options.plot, metadata={"Date": None} if options.plot.suffix == ".svg" else None)


def settings_line(options: argparse.Namespace) -> str:
    return (
        f"{Path(options.teacher).name}: {options.seconds:.0f} s of CPU time each, one thread, float32; batch 4, "
        f"forward KL, learning rate {options.learning_rate:g} falling to 0 with the time; importance measured on "
        f"{options.batches * BATCH} rows."
    )


if __name__ == "__main__":
    main()
