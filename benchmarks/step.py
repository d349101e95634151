"""Where a training step's time goes: by part of the step and by kind of work, beside its bare matrix products.

    python benchmarks/step.py --teacher runs/demo/teacher                 # off-policy and on-policy GKD
    python benchmarks/step.py --teacher FOLDER --what off --batch-size 8 --steps 4

The student is the teacher with two thirds of its layers. Steps are timed without the profiler, after one that warms up,
and profiled afterwards: the profile gives shares, the clock gives seconds. The floor are the products alone: each
product of the profiled steps is done again, at its shapes, as often as it was done, and nothing beside it. Prompts are
those of the recipe; off-policy a prompt is answered by the text of another.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import in_turns, machine, write_results
from methods import RECIPES, user

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
KINDS = {
    "products": PRODUCTS,
    "attention": ("scaled_dot_product", "flash_attention"),
    "softmax and loss": ("softmax", "logsumexp", "aten::exp", "aten::log"),
    "optimiser": ("_fused_adam", "_foreach", "linalg_vector_norm"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "index", "gather", "scatter", "embedding"),
}
NAMES = {"off": "off-policy", "on": "on-policy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--what", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="that are timed, and as many that are profiled")
    parser.add_argument("--new-tokens", type=int, default=48, help="of an on-policy completion, at most")
    parser.add_argument("--compile", action="store_true", help="torch_compile: true")
    parser.add_argument("--quick", action="store_true", help="two rows a step: only shows that it runs")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", choices=list(NAMES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    results = {name: runs[0] for name, runs in in_turns(__file__, options.what, 1).items()}
    described = f"{machine(1)}\n\n{settings_line(options)}"
    print(f"{described}\n\n{table(results)}")
    write_results(options.json, described, results)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One process: steps on the clock, then steps under the profiler, then their products alone."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    trainer = build(name, options)
    label_parts(trainer)
    clock: dict[str, float] = {}
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                clock.update(cpu=time.process_time(), wall=time.perf_counter())
            elif state.global_step == 1 + options.steps:
                clock.update(cpu=time.process_time() - clock["cpu"], wall=time.perf_counter() - clock["wall"])
                profiler.start()
            elif state.global_step == 1 + 2 * options.steps:
                profiler.stop()

    trainer.add_callback(Watch())
    trainer.train()
    shares, products = read(profiler)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry][1:]
    return {
        "cpu_seconds": clock["cpu"] / options.steps,
        "wall_seconds": clock["wall"] / options.steps,
        "floor_seconds": alone(products) / options.steps,
        "trained_tokens": sum(entry.get("trained_tokens", 0) for entry in logs) / max(1, len(logs)),
        "shares": shares,
    }


def build(name: str, options: argparse.Namespace) -> Any:
    """A trainer of the recipe's method on its prompts."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from distill_trainers import GKDConfig, GKDTrainer
    from distill_trainers.models import load_causal_lm
    from distill_trainers.students import even_layers, prune_layers

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = load_causal_lm(options.teacher, dtype="float32")
    total = teacher.config.num_hidden_layers
    student = prune_layers(teacher, even_layers(total, total * 2 // 3))
    lines = (RECIPES / "prompts_train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"][-1]["content"] for line in lines]
    pairs = zip(texts, [*texts[1:], texts[0]], strict=True)
    rows = [{"prompt": [user(q)], "completion": [{"role": "assistant", "content": a}]} for q, a in pairs]
    args = GKDConfig(
        output_dir="runs/step",
        lmbda=1.0 if name == "on" else 0.0,
        max_new_tokens=options.new_tokens,
        max_length=256,
        per_device_train_batch_size=2 if options.quick else options.batch_size,
        max_steps=1 + 2 * options.steps,
        learning_rate=1e-4,
        torch_compile=options.compile,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    return GKDTrainer(student, teacher, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def label_parts(trainer: Any) -> None:
    """Let the profiler know which part of a step it sees."""
    from torch.profiler import record_function

    def labelled(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"part: {label}"):
                return function(*args, **kwargs)

        return call

    trainer.get_batch_samples = labelled(trainer.get_batch_samples, "batches")
    trainer.rollout = labelled(trainer.rollout, "rollout")
    trainer.teacher_signal = labelled(trainer.teacher_signal, "teacher")
    trainer.compute_loss = labelled(trainer.compute_loss, "forward and loss")
    trainer.accelerator.backward = labelled(trainer.accelerator.backward, "backward")
    make = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = make(*args, **kwargs)
        optimizer.step = labelled(optimizer.step, "optimiser")
        return optimizer

    trainer.create_optimizer = create_optimizer


def read(profiler: Any) -> tuple[dict[str, dict[str, float]], Counter]:
    """Shares of the time by part and kind, and how often each product was done at which shapes."""
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    products: Counter = Counter()
    for event in profiler.events():
        parent = event
        while parent is not None and not parent.name.startswith("part: "):
            parent = parent.cpu_parent
        part = "other" if parent is None else parent.name.removeprefix("part: ")
        kind = "python" if event.name.startswith("part: ") else kind_of(event.name)
        seconds[part][kind] += event.self_cpu_time_total
        if event.name in PRODUCTS:
            products[event.name, tuple(map(tuple, event.input_shapes))] += 1
    total = sum(sum(kinds.values()) for kinds in seconds.values())
    return {part: {kind: value / total for kind, value in kinds.items()} for part, kinds in seconds.items()}, products


def kind_of(name: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return "elementwise and norms"


def alone(products: Counter) -> float:
    """Seconds that these products take, one after the other, with nothing between them."""
    import torch

    total = 0.0
    with torch.no_grad():
        for (name, shapes), count in products.items():
            function = getattr(torch, name.removeprefix("aten::"))
            operands = [torch.randn(shape) for shape in shapes if len(shape) > (name == "aten::baddbmm")]
            operands = operands[: 3 if "add" in name else 2]
            function(*operands)
            started, repeats = time.process_time(), min(count, 8)
            for _ in range(repeats):
                function(*operands)
            total += (time.process_time() - started) / repeats * count
    return total


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| step | CPU s | trained tokens a CPU s | bare products, s | step / products |", "|---|---|---|---|---|"]
    for name, got in results.items():
        tokens = got["trained_tokens"] / got["cpu_seconds"]
        ratio = got["cpu_seconds"] / got["floor_seconds"]
        seconds = f"{got['cpu_seconds']:.2f} | {tokens:.0f} | {got['floor_seconds']:.2f}"
        lines.append(f"| {NAMES[name]} | {seconds} | {ratio:.2f} |")
    for name, got in results.items():
        kinds = sorted({kind for part in got["shares"].values() for kind in part})
        lines += ["", f"| {NAMES[name]}: % of the time | {' | '.join(kinds)} | all |"]
        lines.append("|---" * (len(kinds) + 2) + "|")
        for part, shares in sorted(got["shares"].items(), key=lambda item: -sum(item[1].values())):
            each = [f"{100 * shares.get(kind, 0):.1f}" for kind in kinds]
            lines.append(f"| {part} | {' | '.join(each)} | {100 * sum(shares.values()):.1f} |")
    return "\n".join(lines)


def settings_line(options: argparse.Namespace) -> str:
    compiled = ", compiled" if options.compile else ""
    return (
        f"{Path(options.teacher).name} and two thirds of its layers, float32{compiled}; batch {options.batch_size}, "
        f"at most {options.new_tokens} new tokens on-policy; {options.steps} steps after one, then as many profiled."
    )


if __name__ == "__main__":
    main()
