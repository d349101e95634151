"""A student of integers: how much of the KL that rounding opens does quantisation-aware distillation close?

    python benchmarks/quantized.py --teacher runs/demo/teacher --work runs/quantized --seconds 480 --seeds 0 1 2

Teacher and student are one model, so the student unrounded is at 0. Rounded (`ptq`), it is judged on the teacher's
answers to held-out prompts; trained by forward KL on other answers until so many seconds of CPU time are over (`qad`),
it is judged again, and compared with the integers that are loaded from its folder. The teacher's answers are made
once, before; its distributions count, since they are asked for while it trains. Seeds are of the data's order. A
stopped run goes on from what lies in `--work`.
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
from pruning import build, train_and_judge, write_answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder of the teacher, which is the student, too")
    parser.add_argument("--work", type=Path, default=Path("runs/quantized"), help="folder for everything made")
    parser.add_argument("--kind", default="int4", choices=("int4", "int8"))
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=480, help="of CPU time for training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--hidden-weight", type=float, default=0.0, help="of hidden states, see docs/students.md")
    parser.add_argument("--quick", action="store_true", help="a toy teacher, few prompts: only shows that it runs")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        work(options.only[0], int(options.only[1]), options)
        return
    keep_settings(options)
    for name, seed in [("start", 0), *(("qad", seed) for seed in options.seeds)]:
        if not done_file(name, seed, options).is_file():
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name, str(seed)]
            subprocess.run(command, check=True)
    results = {**read("start", 0, options), "qad": [read("qad", seed, options) for seed in options.seeds]}
    described = f"{machine(1)}\n\n{settings_line(options)}"
    print(f"{described}\n\n{table(results)}")
    write_results(options.json, described, results)


def done_file(name: str, seed: int, options: argparse.Namespace) -> Path:
    return options.work / name / str(seed) / "done.json"


def read(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    return json.loads(done_file(name, seed, options).read_text())  # type: ignore[no-any-return]


def work(name: str, seed: int, options: argparse.Namespace) -> None:
    """One process; `done.json` says that it is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = done_file(name, seed, options)
    file.parent.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(options.teacher, dtype="float32").eval()
    settings: dict[str, Any] = {"quantize_student": options.kind, "quantize_group_size": options.group_size}
    started = time.process_time()
    if name == "start":
        done = write_answers(model, AutoTokenizer.from_pretrained(options.teacher), options)
        done["answers_seconds"] = time.process_time() - started
        done["unquantised"] = scores(build(model, 0, options))
        done["ptq"] = scores(build(model, 0, options, **settings))
    else:
        trainer = build(model, seed, options, **settings, hidden_weight=options.hidden_weight)
        done = train_and_judge(trainer, options)
        folder = file.parent / "student"
        trainer.save_model(str(folder))
        done["off"] = largest_difference(AutoModelForCausalLM.from_pretrained(folder), trainer)
        done["bytes"] = sum(part.stat().st_size for part in folder.glob("*.safetensors"))
    file.write_text(json.dumps(done) + "\n")
    print(name, seed, done, flush=True)


def scores(trainer: Any) -> dict[str, float]:
    found = trainer.evaluate()
    return {key: found[f"eval_{key}"] for key in ("kl", "top1_agreement", "perplexity", "tokens")}


def largest_difference(loaded: Any, trainer: Any) -> float:
    """Of the logits of a model of integers and of the trained student, on some held-out rows."""
    import torch

    rows = [torch.tensor([trainer.eval_dataset[number]["input_ids"]]) for number in range(4)]
    student = trainer.model.eval()
    with torch.no_grad():
        return max(float((loaded(row).logits - student(row).logits).abs().max()) for row in rows)


def table(results: dict[str, Any]) -> str:
    opened, runs = results["ptq"]["kl"], results["qad"]
    lines = [
        "| student | held-out KL | closed | top-1 agreement | steps | CPU s |",
        "|" + "---|" * 6,
    ]
    lines.append(f"| unquantised | {results['unquantised']['kl']:.4f} | | | | |")
    lines.append(f"| rounded | {opened:.4f} | | {results['ptq']['top1_agreement']:.3f} | | |")
    for run in runs:
        lines.append(
            f"| trained rounded | {run['kl']:.4f} | {1 - run['kl'] / opened:.1%} | {run['top1_agreement']:.3f} "
            f"| {run['steps']:.0f} | {run['cpu_seconds']:.0f} |"
        )
    mean = statistics.fmean(run["kl"] for run in runs)
    lines.append(f"| mean | {mean:.4f} | {1 - mean / opened:.1%} | | | |")
    return "\n".join(lines)


def settings_line(options: argparse.Namespace) -> str:
    return (
        f"{Path(options.teacher).name}, {options.kind} in groups of {options.group_size}: {options.seconds:.0f} s of "
        f"CPU time, one thread, float32; batch 4, forward KL, rate {options.learning_rate:g}, which falls to 0 "
        f"with the time, hidden states weighed {options.hidden_weight:g}."
    )


if __name__ == "__main__":
    main()
