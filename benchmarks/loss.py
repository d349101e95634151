"""The fused loss beside its floor and beside other libraries' losses, in one run: time and extra peak memory of JSD.

    python benchmarks/loss.py                          # 1024 tokens, 49152 ids, 576 hidden units, float32
    python benchmarks/loss.py --masked-share 0.48      # about half of the tokens are prompt or padding
    python benchmarks/loss.py --reuse-heap             # an allocator that keeps its pages, after one call to fill it
    python benchmarks/loss.py --quick --json out.json  # the same code on a toy, for the tests

From last hidden states of both models to the gradients of the student's hidden states and head weight. Every
measurement is a process of its own, and the losses take turns, so that whatever else runs on the machine meets them
alike. The floor is the bare matrix products of the trained tokens: student's and teacher's logits, and the two
gradients of the student. TRL's and Liger's losses are called as installed; Liger is left out where it is not, and runs
without torch.compile, 256 tokens at a time (its default of 1024 would not cut anything here).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import Meter, in_turns, machine, medians, write_results

LOSSES = {
    "bare": "matrix products alone",
    "ours": "ours: fused_linear_divergence",
    "trl_gkd": "TRL: GKDTrainer's loss on full logits",
    "trl_distillation": "TRL: DistillationTrainer's chunked loss",
    "liger": "Liger: chunked JSD",
}
FULL = {"tokens": 1024, "vocab": 49152, "hidden": 576}
QUICK = {"tokens": 64, "vocab": 2048, "hidden": 32}
# glibc: no block is mapped by itself, and freed pages stay with the process.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy size and one round")
    parser.add_argument("--tokens", type=int, help="of the batch, trained or not")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--hidden", type=int, help="of student and teacher")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 is the steadiest on a shared machine")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=None, help="processes per loss (3; quick: 1)")
    parser.add_argument("--masked-share", type=float, default=0.0, help="share of the tokens that are not trained")
    parser.add_argument("--chunk-mib", type=float, default=32.0, help="ours: MiB of one chunk of logits")
    parser.add_argument("--reuse-heap", action="store_true", help="glibc keeps freed pages; one call fills the heap")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--json", type=Path, help="write all measurements here")
    parser.add_argument("--only", choices=list(LOSSES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    repeats = options.repeats or (1 if options.quick else 3)
    results = compare(options, repeats)
    described = f"{machine(options.threads, options.device)}\n\n{settings_line(options, repeats)}"
    print(f"{described}\n\n{table(results)}")
    write_results(options.json, described, results)


def compare(options: argparse.Namespace, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Results of every process, by loss."""
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    names = [name for name in options.losses if name != "liger" or has_liger]
    return in_turns(__file__, names, repeats, environment=KEEP_PAGES if options.reuse_heap else None)


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One timed call in this process: seconds on the clock and of the process, extra peak MiB, mean loss."""
    import torch

    torch.set_num_threads(options.threads)
    call, forget = prepare(name, operands(options), options)
    meter = Meter(options.device)
    if (
        options.reuse_heap or meter.on_gpu
    ):  # whose allocator keeps its pages, and whose kernels load at their first call
        call()
        forget()
    before = meter.now()
    loss = call()
    seconds, cpu_seconds = (end - start for start, end in zip(before, meter.now(), strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_mib": meter.extra_mib(), "loss": loss}


def operands(options: argparse.Namespace) -> dict[str, Any]:
    """Hidden states and heads of both models, alike for every loss, and which tokens are trained."""
    import torch

    draw = torch.Generator().manual_seed(0)
    tokens, vocab, hidden = options.tokens, options.vocab, options.hidden
    made = {
        "student_hidden": torch.randn(tokens, hidden, generator=draw),
        "teacher_hidden": torch.randn(tokens, hidden, generator=draw),
        "student_weight": torch.randn(vocab, hidden, generator=draw).mul_(2 * hidden**-0.5),
        "teacher_weight": torch.randn(vocab, hidden, generator=draw).mul_(2 * hidden**-0.5),
        "trained": torch.rand(tokens, generator=draw) >= options.masked_share,
    }
    made["labels"] = torch.where(made["trained"], torch.randint(vocab, (tokens,), generator=draw), -100)
    made = {name: value.to(options.device) for name, value in made.items()}
    for name in ("student_hidden", "student_weight"):
        made[name].requires_grad_()
    some = torch.randn(64, 64, device=options.device)
    some @ some  # the library of matrix products sets itself up
    return made


def prepare(name: str, data: dict[str, Any], options: argparse.Namespace) -> tuple[Callable[[], float], Callable]:
    """The call to be timed, which leaves gradients and returns the mean loss, and how to forget those gradients."""
    loss_of = {
        "bare": bare,
        "ours": ours,
        "trl_gkd": trl_gkd,
        "trl_distillation": trl_distillation,
        "liger": liger,
    }[name](data, options)

    def call() -> float:
        loss = loss_of()
        if loss is None:
            return float("nan")
        loss.backward()
        return loss.item()

    def forget() -> None:
        data["student_hidden"].grad = data["student_weight"].grad = None

    return call, forget


def bare(data: dict[str, Any], options: argparse.Namespace) -> Callable[[], None]:
    """2 N V (3 d_s + d_t) operations and no pass over their results; logits in two buffers made beforehand."""
    import torch

    student, teacher = (data[f"{side}_hidden"].detach()[data["trained"]] for side in ("student", "teacher"))
    student_weight, teacher_weight = data["student_weight"].detach(), data["teacher_weight"]
    rows = 256
    buffers = [torch.ones(rows, options.vocab, device=options.device) for _ in range(2)]

    def products() -> None:
        weight_gradient, hidden_gradient = torch.zeros_like(student_weight), torch.empty_like(student)
        for start in range(0, len(student), rows):
            chunk = student[start : start + rows]
            mine, theirs = (buffer[: len(chunk)] for buffer in buffers)
            torch.mm(chunk, student_weight.T, out=mine)
            torch.mm(teacher[start : start + rows], teacher_weight.T, out=theirs)
            torch.mm(mine, student_weight, out=hidden_gradient[start : start + rows])
            weight_gradient.addmm_(mine.T, chunk)

    return products


def ours(data: dict[str, Any], options: argparse.Namespace) -> Callable[[], Any]:
    from distill_trainers.losses import fused_linear_divergence

    def loss() -> Any:
        trained = data["trained"]
        total = fused_linear_divergence(
            data["student_hidden"][trained],
            data["student_weight"],
            data["teacher_hidden"][trained],
            data["teacher_weight"],
            divergence="jsd",
            chunk_bytes=int(options.chunk_mib * 2**20),
        )
        return total / trained.sum()

    return loss


def trl_gkd(data: dict[str, Any], options: argparse.Namespace) -> Callable[[], Any]:
    import torch
    from trl.experimental.gkd import GKDTrainer

    def loss() -> Any:
        student = torch.nn.functional.linear(data["student_hidden"], data["student_weight"])
        with torch.no_grad():
            teacher = torch.nn.functional.linear(data["teacher_hidden"], data["teacher_weight"])
        trained = data["trained"].sum()
        return GKDTrainer.generalized_jsd_loss(
            student[None], teacher[None], data["labels"][None], beta=0.5, num_items_in_batch=trained
        )

    return loss


def trl_distillation(data: dict[str, Any], options: argparse.Namespace) -> Callable[[], Any]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss() -> Any:
        hidden = (data[f"{side}_hidden"][None] for side in ("student", "teacher"))
        weights = (data[f"{side}_weight"] for side in ("student", "teacher"))
        return _chunked_divergence_loss(*hidden, *weights, data["trained"][None], 0.5)[0]

    return loss


def liger(data: dict[str, Any], options: argparse.Namespace) -> Callable[[], Any]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False, chunk_size=min(256, options.tokens)
    )
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "labels")
    return lambda: loss(*(data[name] for name in names))


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the processes, the range of times, and ratios to the matrix products and to ours."""
    lines = [
        "| loss | s (range) | to the products | to ours | CPU s | to the products | extra peak MiB | to ours | JSD |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    middle = medians(results)

    def ratio(name: str, key: str, to: str) -> str:
        return f"{middle[name][key] / middle[to][key]:.2f}" if to in middle else ""

    for name, got in middle.items():
        seconds = [run["seconds"] for run in results[name]]
        memory = "" if name == "bare" else f"{got['extra_mib']:.0f}"  # its logits were there before
        lines.append(
            f"| {LOSSES[name]} | {got['seconds']:.2f} ({min(seconds):.2f}–{max(seconds):.2f}) "
            f"| {ratio(name, 'seconds', 'bare')} | {ratio(name, 'seconds', 'ours')} "
            f"| {got['cpu_seconds']:.2f} | {ratio(name, 'cpu_seconds', 'bare')} "
            f"| {memory} | {ratio(name, 'extra_mib', 'ours') if memory else ''} "
            f"| {'' if name == 'bare' else format(got['loss'], '.6g')} |"
        )
    return "\n".join(lines) + "\n"


def settings_line(options: argparse.Namespace, repeats: int) -> str:
    heap = "freed pages stay with the process" if options.reuse_heap else "the system's allocator as it is"
    return (
        f"{options.tokens} tokens, {options.masked_share:.0%} of them not trained, {options.vocab} ids, "
        f"{options.hidden} hidden units on both sides, float32, JSD with beta 0.5; ours in chunks of "
        f"{options.chunk_mib:g} MiB; {heap}; median of {repeats} process(es) that take turns. Extra peak memory is "
        "over what was held before the call, the gradients included."
    )


if __name__ == "__main__":
    main()
