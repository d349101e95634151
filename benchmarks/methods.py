"""Every method on one budget: our four trainers, plain SFT and TRL's two, from one student, judged by our evaluation.

    python benchmarks/methods.py --teacher runs/demo/teacher --work runs/methods --seconds 150 --seeds 0 1 2

All start from one student, 20 of the teacher's 30 layers, and train on the same prompts with the same batch size until
so many seconds of CPU time are over. What is made once is not counted: the student, and the teacher's answers (and,
for rationales, its explanations). What a method itself samples is. Learning rates fall to 0 as the time runs out. Each
training is a process of its own; all students are then judged by `distill-trainers evaluate` on held-out prompts.

A stopped run goes on: trainings that are done, and what evaluation has sampled, are kept in `--work`.
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

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "smollm2-135m"
SHORT = " Answer in one or two short sentences."
WHY = " Explain in two or three short sentences how to find the answer."
MINILLM = {"teacher_mix_alpha": 0.2, "num_minibatches": 2, "num_inner_epochs": 2}
# By name: what the table calls it, our method (or TRL's trainer), its settings, and the learning rate: one for all, but
# a lower one for the losses of whole sequences.
CONTENDERS: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "sft": ("SFT on the teacher's answers (TRL's SFTTrainer)", "trl sft", {}, 3e-4),
    "trl_gkd": ("TRL's GKDTrainer, forward KL, off-policy", "trl gkd", {}, 3e-4),
    "trl_distillation": ("TRL's DistillationTrainer, forward KL, on-policy", "trl distillation", {}, 3e-4),
    "gkd": ("GKDTrainer, forward KL, off-policy", "gkd", {"lmbda": 0.0, "divergence": "forward_kl"}, 3e-4),
    "minillm": ("MiniLLMTrainer, from the start", "minillm", MINILLM, 1e-4),
    "gkd_minillm": ("GKDTrainer for half the time, then MiniLLMTrainer", "minillm", MINILLM, 1e-4),
    "dpkd": ("DPKDTrainer, at its defaults", "dpkd", {"chosen": "dataset"}, 1e-4),
    "dpkd_reused": (
        "DPKDTrainer, responses reused",
        "dpkd",
        {"chosen": "dataset", "refresh_steps": 4},
        3e-4,
    ),
    "rationale": ("RationaleTrainer, step_by_step", "rationale", {"eval_accuracy": False}, 3e-4),
}
FIRST = {"gkd_minillm": "gkd"}  # who trains the first half of the time
METRICS = ("perplexity", "agreement", "rouge_l", "diversity", "calibration")
COLUMNS = {
    "kl": ("KL(p‖q), nats", "{:.3f}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "student_text_reverse_kl": ("KL(q‖p) on its own text", "{:.2f}"),
    "top1_agreement": ("top-1", "{:.3f}"),
    "rouge_l": ("Rouge-L", "{:.1f}"),
    "ece": ("ECE", "{:.3f}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--work", type=Path, default=Path("runs/methods"), help="folder for everything made")
    parser.add_argument("--seconds", type=float, default=150, help="of CPU time for training, for each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data order and sampling")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--keep-layers", type=int, default=20)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--quick", action="store_true", help="few prompts, few tokens: only shows that it runs")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        work(*options.only, options)
        return
    keep_settings(options)
    alone("prepare", 0, options)
    for seed in options.seeds:
        for name in options.contenders:
            alone(name, seed, options)
    evaluate(options)
    results = summary(options)
    described = f"{machine(1)}\n\n{settings_line(options)}"
    print(f"{described}\n\n{table(results)}")
    write_results(options.json, described, results)


def alone(name: str, seed: int, options: argparse.Namespace) -> None:
    if not (options.work / name / str(seed) / "done.json").is_file():
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name, str(seed)]
        subprocess.run(command, check=True)


def work(name: str, seed: str, options: argparse.Namespace) -> None:
    """One process: prepare, or train one contender with one seed; `done.json` says that it is complete."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = options.work / name / seed
    folder.mkdir(parents=True, exist_ok=True)
    done = prepare(options) if name == "prepare" else train(name, int(seed), options)
    (folder / "done.json").write_text(json.dumps(done) + "\n")
    print(name, seed, done, flush=True)


# ---- What all share --------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> dict[str, float]:
    """The student, and for every prompt the teacher's answer and explanation, sampled at temperature 1.

    Rows whose texts do not end by themselves are left out: a cut answer would teach some trainers to stop there.
    """
    from transformers import AutoTokenizer

    from distill_trainers.models import load_causal_lm

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = load_causal_lm(options.teacher, dtype="float32").eval()
    counts: dict[str, float] = {}
    for part, limit in (("train", 8), ("heldout", 4)):
        lines = (RECIPES / f"prompts_{part}.jsonl").read_text(encoding="utf-8").splitlines()
        asked = [json.loads(line)["prompt"][-1]["content"] for line in lines][: limit if options.quick else None]
        prompts = [text + SHORT for text in asked]
        answers = sampled(teacher, tokenizer, prompts, options, 1.0)
        if part == "train":
            others = sampled(teacher, tokenizer, [text + WHY for text in asked], options, 1.0)
        else:
            others = sampled(teacher, tokenizer, prompts, options, 0.0)  # what Rouge-L compares with
        made = [
            {"question": prompt, "answer": answer, "other": other}
            for prompt, answer, other in zip(prompts, answers, others, strict=True)
            if answer and other
        ]
        (options.work / f"{part}.jsonl").write_text("\n".join(map(json.dumps, made)) + "\n", encoding="utf-8")
        counts[f"{part}_rows"] = len(made)
    data = [
        {"prompt": [user(row["question"])], "completion": row["answer"], "references": [row["other"]]}
        for row in rows_of("heldout", options)
    ]
    (options.work / "evaluation.jsonl").write_text("\n".join(map(json.dumps, data)) + "\n", encoding="utf-8")
    make_start(options)
    return counts


def sampled(
    model: Any, tokenizer: Any, prompts: list[str], options: argparse.Namespace, temperature: float
) -> list[str]:
    """The model's answers, in order; empty for those that did not end."""
    import torch

    from distill_trainers.randomness import Purpose, Role, Stream
    from distill_trainers.rollouts import DecodeEngine, SamplingSettings

    ids = [
        tokenizer.apply_chat_template([user(text)], add_generation_prompt=True, return_dict=False) for text in prompts
    ]
    width, pad = max(map(len, ids)), tokenizer.pad_token_id
    inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    end = tokenizer.eos_token_id
    settings = SamplingSettings(96, temperature, eos_token_ids=[end], pad_token_id=pad)
    streams = [Stream(0, Role.TEACHER, Purpose.COMPLETION).at(row=row) for row in range(len(ids))]
    written = DecodeEngine(batch_size=96).generate(model, inputs, mask, settings, streams)
    texts = [tokenizer.decode(each, skip_special_tokens=True).strip() for each in written]
    if options.quick:  # a random teacher ends nothing, and may say nothing
        return [text or "nothing" for text in texts]
    return [text if each[-1] == end else "" for text, each in zip(texts, written, strict=True)]


def make_start(options: argparse.Namespace) -> None:
    from distill_trainers.cli.train import make_initial_student
    from distill_trainers.recipe.checks import check_recipe
    from distill_trainers.recipe.parse import parse_recipe

    init = {"from_teacher": True, "keep_layers": options.keep_layers, "strategy": "even"}
    if not options.quick:
        init |= {"strategy": "importance", "measure": "kl", "importance_batches": 1}
    rows = options.work / "prompts.jsonl"
    measured_on = conversations(options)[:2]  # each of 30 + 29 + … + 21 measurements reads them
    rows.write_text("\n".join(map(json.dumps, measured_on)) + "\n", encoding="utf-8")
    argv = ["--config", str(RECIPES / "gkd.yaml"), "--teacher_model_name_or_path", options.teacher]
    argv += ["--dataset", str(rows), "--output_dir", str(options.work), "--student_init", json.dumps(init)]
    argv += ["--seq_kd", "false", "--eval_dataset", str(rows)]
    recipe = parse_recipe(argv)
    make_initial_student(recipe, check_recipe(recipe).ready.rows()[0])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def rows_of(part: str, options: argparse.Namespace) -> list[dict[str, str]]:
    return [json.loads(line) for line in (options.work / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def conversations(options: argparse.Namespace) -> list[dict[str, Any]]:
    answer = lambda row: {"role": "assistant", "content": row["answer"]}  # noqa: E731
    return [{"messages": [user(row["question"]), answer(row)]} for row in rows_of("train", options)]


# ---- One training ----------------------------------------------------------------------------------------------------


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train until the CPU time is over, save the student under its name and seed."""
    from transformers import TrainerCallback

    class Budget(TrainerCallback):
        """Ends training when its CPU time is over; until then the learning rate falls with it."""

        def __init__(self, seconds: float, learning_rate: float) -> None:
            self.seconds, self.learning_rate = seconds, learning_rate

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.process_time()

        @property
        def spent(self) -> float:
            return time.process_time() - self.begun

        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            warm = min(1.0, (state.global_step + 1) / 3)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * warm * max(0.0, 1 - self.spent / self.seconds)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = self.spent + 0.5 * self.spent / state.global_step > self.seconds

    output, start = options.work / name / str(seed) / "student", options.work / "student_init"
    stages = [*([FIRST[name]] if name in FIRST else []), name]
    steps, spent = 0, 0.0
    for stage in stages:
        budget = Budget(options.seconds / len(stages), CONTENDERS[stage][3])
        trainer = build(stage, seed, start, options)
        trainer.add_callback(budget)
        trainer.get_train_dataloader()  # what it prepares of its rows is not counted
        trainer.train()
        steps, spent = steps + trainer.state.global_step, spent + budget.spent
        trainer.save_model(str(output))
        start = output
    trainer.processing_class.save_pretrained(output)
    return {"steps": steps, "cpu_seconds": spent}


def build(name: str, seed: int, start: Path, options: argparse.Namespace) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, method, own, learning_rate = CONTENDERS[name]
    tokens = 8 if options.quick else 64
    settings: dict[str, Any] = {
        "output_dir": str(options.work / "runs" / name),
        "max_length": 512,  # longer than any row
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": 100_000,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "bf16": False,  # TRL's default is True, which takes a processor that multiplies in it
        "use_cpu": True,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
    }
    models: dict[str, Any] = {"processing_class": AutoTokenizer.from_pretrained(options.teacher)}
    models["model"] = AutoModelForCausalLM.from_pretrained(start, dtype="float32")
    rows = conversations(options)
    if method != "trl sft" and name != "rationale":  # the two that learn from text alone
        models["teacher_model"] = AutoModelForCausalLM.from_pretrained(options.teacher, dtype="float32")
    if method.startswith("trl"):
        return build_trl(method, settings, models, rows, tokens)
    from distill_trainers.trainers import METHODS

    if method == "minillm":
        rows = [{"prompt": row["messages"][:-1]} for row in rows]
    elif method == "dpkd":
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    elif method == "rationale":
        own = {**own, "prompt_style": "chat", "label_prompt": "{question}", "rationale_prompt": "{question}" + WHY}
        texts = rows_of("train", options)
        rows = [{"question": r["question"], "answer": r["answer"], "rationale": r["other"]} for r in texts]
    config, trainer = METHODS[method]
    settings |= {"max_new_tokens": tokens, "rollout_batch_size": 96, **own}
    return trainer(**models, args=config(**settings), train_dataset=Dataset.from_list(rows))


def build_trl(method: str, settings: dict[str, Any], models: Any, rows: Any, tokens: int) -> Any:
    from datasets import Dataset

    settings = {**settings, "activation_checkpointing": False}  # they recompute activations unless told otherwise
    prompts = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    if method == "trl sft":
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(**models, args=SFTConfig(**settings), train_dataset=Dataset.from_list(prompts))
    if method == "trl gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        args = GKDConfig(**settings, lmbda=0.0, beta=0.0, temperature=1.0, max_new_tokens=tokens)
        return GKDTrainer(**models, args=args, train_dataset=Dataset.from_list(rows))
    from trl import DistillationConfig, DistillationTrainer

    del settings["max_length"]
    args = DistillationConfig(**settings, beta=0.0, temperature=1.0, max_completion_length=tokens)
    only = Dataset.from_list([{"prompt": row["prompt"]} for row in prompts])
    return DistillationTrainer(**models, args=args, train_dataset=only)


# ---- Judging ---------------------------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> None:
    """`distill-trainers evaluate` for all students that are there; those of before cost nothing again."""
    students = {
        f"{name}-{seed}": str(options.work / name / str(seed) / "student")
        for name in options.contenders
        for seed in options.seeds
        if (options.work / name / str(seed) / "done.json").is_file()
    }
    settings = {
        "students": students,
        "teacher": options.teacher,
        "baseline": str(options.work / "student_init"),
        "model_init_kwargs": {"dtype": "float32"},
        "dataset": str(options.work / "evaluation.jsonl"),
        "output_dir": str(options.work / "evaluation"),
        "metrics": list(METRICS),
        "max_length": 640,
        "max_new_tokens": 8 if options.quick else 64,
        "seeds": [10, 20],
        "batch_size": 48,
        "use_cpu": True,
    }
    file = options.work / "evaluation.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    subprocess.run([sys.executable, "-m", "distill_trainers.cli.evaluate", "--config", str(file)], check=True)


def summary(options: argparse.Namespace) -> dict[str, Any]:
    """By contender: steps, and of every score the mean over training seeds, the mean ends of the intervals over
    prompts, the range over seeds, and the mean share of the gap closed."""
    from distill_trainers.evaluation import EvaluationResults

    results = EvaluationResults.load(options.work / "evaluation")

    def scores(names: list[str]) -> dict[str, dict[str, float]]:
        found = {}
        for column in COLUMNS:
            each = [results.model(name).scores[column] for name in names if column in results.model(name).scores]
            values = {
                "value": [score.value for score in each],
                "low": [score.low for score in each],
                "high": [score.high for score in each],
                "gap_closed": [score.gap_closed.value if score.gap_closed else None for score in each],
            }
            if each:
                found[column] = {key: mean(got) for key, got in values.items()}
                found[column] |= {"least": min(values["value"]), "most": max(values["value"])}
        return found

    out: dict[str, Any] = {}
    for role, title in (("baseline", "the student at the start"), ("teacher", "the teacher")):
        out[title] = {"scores": scores([model.name for model in results.of_role(role)])}
    for name in options.contenders:
        done = [json.loads((options.work / name / str(seed) / "done.json").read_text()) for seed in options.seeds]
        out[CONTENDERS[name][0]] = {
            "steps": statistics.mean(each["steps"] for each in done),
            "cpu_seconds": statistics.mean(each["cpu_seconds"] for each in done),
            "scores": scores([f"{name}-{seed}" for seed in options.seeds]),
        }
    return out


def mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def table(results: dict[str, Any]) -> str:
    """Markdown: means over training seeds, mean intervals over prompts, and how far the seeds' KLs are apart."""
    titles = [title for title, _ in COLUMNS.values()]
    lines = [["", "steps", "gap closed in KL", titles[0], "seeds", *titles[1:]]]
    lines.append(["---"] * len(lines[0]))
    for name, row in results.items():
        trained, scores = "steps" in row, row["scores"]
        closed = scores.get("kl", {}).get("gap_closed") if trained else None
        cells = [name, f"{row['steps']:.0f}" if trained else "–", "–" if closed is None else f"{closed:.0%}"]
        for column, (_, shape) in COLUMNS.items():
            score = scores.get(column, {"value": None})
            cells.append("–" if score["value"] is None else interval(score, shape))
            if column == "kl":
                cells.append(f"{score['least']:.3f} to {score['most']:.3f}" if trained else "–")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(score: dict[str, float], shape: str) -> str:
    if score["low"] is None or score["high"] is None:
        return shape.format(score["value"])
    return f"{shape.format(score['value'])} [{shape.format(score['low'])}, {shape.format(score['high'])}]"


def settings_line(options: argparse.Namespace) -> str:
    made = json.loads((options.work / "prepare" / "0" / "done.json").read_text())
    return (
        f"{Path(options.teacher).name}: {options.keep_layers} of its layers as the student; {options.seconds:.0f} s of "
        f"CPU time each, {len(options.seeds)} seeds; {made['train_rows']} rows to train on, {made['heldout_rows']} "
        f"held out; batch {options.batch_size}, float32, samples of at most 64 tokens."
    )


if __name__ == "__main__":
    main()
