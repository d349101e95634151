"""All that a GPU changes, in one command and under ten minutes: the loss, whole steps, rollouts by vLLM.

    python benchmarks/gpu.py --json gpu.json            # on a GPU: student of Qwen2.5-0.5B's shape, teacher of 7B's
    python benchmarks/gpu.py --parts loss bytes         # some of it
    python benchmarks/gpu.py --quick                    # toys; without a GPU that is all there is

Every part is a process of its own with a time budget, and tells its figures one by one: what fails, or is not there, or
takes too long, is written down as that, and the other parts go on. Weights are random, in the shapes of
recipes/architectures: speed and memory do not depend on them, but what a student writes does, so rollouts run to their
limit. Peak memory is over what was held before the call or the training; on a CPU it is not told apart by contender.

- `bytes`: what the loss reads and writes beside its products, per token; counted, not measured.
- `loss`: from hidden states to gradients, beside bare products (bfloat16), TRL's losses and Liger's.
- `off_policy`, `on_policy`: optimiser steps of GKD, with the Triton kernels and without.
- `vllm`: the on-policy step with vLLM in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compare_trl import context, conversations, word_tokenizer
from loss import LOSSES, prepare
from measuring import Meter, machine, write_results

ARCHITECTURES = Path(__file__).parents[1] / "recipes" / "architectures"
BUDGETS = {"bytes": 45, "loss": 150, "off_policy": 130, "on_policy": 130, "vllm": 125}  # seconds
LOSS = {"tokens": 8192, "vocab": 151936, "hidden": 896, "teacher_hidden": 3584, "repeats": 5}
STEP = {"vocab": 151643, "batch": 8, "length": 1024, "new_tokens": 128, "warmup": 2, "steps": 5}
QUICK_LOSS = {"tokens": 64, "vocab": 1024, "hidden": 32, "teacher_hidden": 32, "repeats": 1}
QUICK_STEP = {"vocab": 512, "batch": 2, "length": 32, "new_tokens": 4, "warmup": 1, "steps": 2}
SHAPES = {"student": "Qwen--Qwen2.5-0.5B-Instruct.json", "teacher": "Qwen--Qwen2.5-7B-Instruct.json"}
QUICK_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
QUICK_SHAPE |= {"num_key_value_heads": 1, "vocab_size": 512}
CONTENDERS = {**LOSSES, "ours_plain": "ours: without the Triton kernels"}

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes; always so without a GPU")
    parser.add_argument("--parts", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--json", type=Path, help="write all records here")
    parser.add_argument("--only", choices=list(BUDGETS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.quick |= options.device == "cpu"
    if options.only:
        for record in {"bytes": count_bytes, "loss": losses, "vllm": rollouts}.get(options.only, steps)(options):
            print(json.dumps(record), flush=True)
        return
    described = f"{machine(torch.get_num_threads(), options.device)}\n\n{sizes_line(options.quick)}"
    print(f"{described}\n", flush=True)
    results = {}
    for part in options.parts:
        results[part] = run_part(part, options.quick)
        print(f"**{part}**\n\n{table(results[part])}", flush=True)
        write_results(options.json, described, results)


def run_part(part: str, quick: bool) -> list[Record]:
    """The records of a part, run in a process of its own; the last one tells if it failed or took too long."""
    command = [sys.executable, __file__, "--only", part, *(["--quick"] if quick else [])]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        failure = None
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        try:
            code = process.wait(BUDGETS[part])
            if code:
                err.seek(0)
                failure = (err.read().strip().splitlines() or [f"exit status {code}"])[-1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that vLLM has started
            process.wait()
            failure = f"more than {BUDGETS[part]} s"
        out.seek(0)
        records = [json.loads(line) for line in out.read().splitlines() if line.startswith('{"name"')]
    return records + ([{"name": part, "failed": failure[:300]}] if failure else [])


def tried(name: str, measure: Callable[[], Record]) -> Record:
    """What `measure` gives, or why it gives nothing: full memory, a package of another version, a bad operand."""
    import torch

    try:
        return {"name": name, **measure()}
    except Exception as error:
        return {"name": name, "failed": f"{type(error).__name__}: {error}"[:300]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ---- Bytes, counted


def count_bytes(options: argparse.Namespace) -> Iterator[Record]:
    """Multiples of one chunk of float32 logits, `[n, V]`, that go to and from memory between the products."""
    kernels = {"forward": 2 * 2, "backward": 2 + 1}  # both sides twice; both once more, and the gradient
    for divergence in ("forward_kl", "jsd", "skew_forward_kl"):
        for head in ({}, {"soft_cap": 30.0}):
            measure = functools.partial(passes_by_torch, divergence, head)
            name = f"{divergence}{', soft cap' if head else ''}"
            yield tried(name, lambda measure=measure: {"by_torch": measure(), "by_kernels": sum(kernels.values())})


def passes_by_torch(divergence: str, head: dict[str, float]) -> float:
    """Of the plain path: each operation reads every operand of that size once, and writes its result once."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from distill_trainers.losses import fused_linear_divergence, workspace

    tokens, vocab, hidden, total = 8, 997, 4, 0
    workspace._CPU_BLOCK_BYTES = 2**30  # in one block, as on a GPU

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal total
            made, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
            if func.is_view or name in ("mm", "addmm", "addmm_", "detach", "empty_like", "empty", "new_empty"):
                return made
            sizes = [each.numel() for each in [*args, made] if isinstance(each, torch.Tensor)]
            total += sum(size >= tokens * vocab for size in sizes)
            return made

    draw = torch.Generator().manual_seed(0)
    shapes = [(tokens, hidden), (vocab, hidden)] * 2
    given = [torch.randn(shape, generator=draw) for shape in shapes]
    for each in given[:2]:
        each.requires_grad_()
    settings = {f"{side}_{name}": value for side in ("student", "teacher") for name, value in head.items()}
    with Counter():
        fused_linear_divergence(*given, divergence=divergence, chunk_bytes=2**30, **settings).backward()
    return total


# ---- The loss alone


def losses(options: argparse.Namespace) -> Iterator[Record]:
    for name in ("bare", "ours", "ours_plain", "trl_gkd", "trl_distillation", "liger"):
        if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
            yield {"name": CONTENDERS[name], "failed": "not installed"}
        else:
            yield tried(CONTENDERS[name], functools.partial(loss_alone, name, options))


def loss_alone(name: str, options: argparse.Namespace) -> Record:
    """Median seconds of a call after the first, extra peak MiB, mean loss."""
    import torch

    from distill_trainers.losses.kernels import without_kernels

    size = QUICK_LOSS if options.quick else LOSS
    # `ours` in the chunks that a trainer takes; nothing is masked.
    settings = argparse.Namespace(**vars(options), **size, masked_share=0.0, chunk_mib=32 if options.quick else 1024)
    data = operands(size, options.device)
    if name == "bare":
        call, forget = functools.partial(bare, data), lambda: None
    else:
        call, forget = prepare(name.removesuffix("_plain"), data, settings)
    seconds, loss = [], None
    with without_kernels() if name == "ours_plain" else contextlib.nullcontext():
        for _ in range(1 + size["repeats"]):
            forget()
            meter = Meter(options.device)
            before = meter.now()[0]
            loss = call()
            seconds.append(meter.now()[0] - before)
    del data
    peak = meter.extra_mib() if torch.cuda.is_available() else None
    return {"seconds": statistics.median(seconds[1:]), "first": seconds[0], "extra_mib": peak, "loss": loss}


def operands(size: dict[str, int], device: str) -> dict[str, Any]:
    """What `loss.operands` gives, with a teacher of another width, in the dtype in which a GPU multiplies."""
    import torch

    draw, made = torch.Generator(device).manual_seed(0), {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for side, width in (("student", size["hidden"]), ("teacher", size["teacher_hidden"])):
        made[f"{side}_hidden"] = torch.randn(size["tokens"], width, generator=draw, device=device, dtype=dtype)
        weight = torch.randn(size["vocab"], width, generator=draw, device=device, dtype=dtype)
        made[f"{side}_weight"] = weight.mul_(2 * width**-0.5)
    made["trained"] = torch.ones(size["tokens"], dtype=torch.bool, device=device)
    made["labels"] = torch.randint(size["vocab"], (size["tokens"],), generator=draw, device=device)
    for name in ("student_hidden", "student_weight"):
        made[name].requires_grad_()
    return made


def bare(data: dict[str, Any]) -> None:
    """The four products of each 2048 tokens, their results in the operands' dtype and not looked at."""
    import torch

    student, weight = data["student_hidden"].detach(), data["student_weight"].detach()
    weight_gradient, hidden_gradient = torch.zeros_like(weight), torch.empty_like(student)
    for start in range(0, len(student), 2048):
        rows = slice(start, start + 2048)
        logits = student[rows] @ weight.T
        data["teacher_hidden"][rows] @ data["teacher_weight"].T
        torch.mm(logits, weight, out=hidden_gradient[rows])
        weight_gradient.addmm_(logits.T, student[rows])


# ---- Whole steps


def steps(options: argparse.Namespace) -> Iterator[Record]:
    from distill_trainers.losses.kernels import without_kernels

    lmbda = 1.0 if options.only == "on_policy" else 0.0
    yield tried("ours: GKDTrainer", lambda: train(options, lmbda=lmbda))
    if lmbda == 0:
        with without_kernels():
            yield tried("ours: GKDTrainer, without the Triton kernels", lambda: train(options, lmbda=lmbda))


def rollouts(options: argparse.Namespace) -> Iterator[Record]:
    name = "ours: GKDTrainer, rollouts by vLLM"
    if importlib.util.find_spec("vllm") is None:
        yield {"name": name, "failed": "not installed"}
    else:
        engine = {"mode": "colocate", "gpu_memory_utilization": 0.3, "max_model_len": 2048}
        yield tried(name, lambda: train(options, lmbda=1.0, rollout_engine="vllm", vllm_kwargs=engine))


def train(options: argparse.Namespace, **settings: Any) -> Record:
    """Median seconds of an optimiser step, extra peak MiB of training, MiB of the models, loss of the first step."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from distill_trainers import GKDConfig, GKDTrainer

    on_gpu, size = options.device == "cuda", QUICK_STEP if options.quick else STEP
    tokenizer, before = word_tokenizer(size["vocab"]), Meter(options.device)
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(
            output_dir=folder,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            per_device_train_batch_size=size["batch"],
            max_steps=size["warmup"] + size["steps"],
            max_new_tokens=size["new_tokens"],
            max_length=context(size),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **settings,
        )
        models = {side: random_model(side, tokenizer, options) for side in ("student", "teacher")}
        trainer = GKDTrainer(
            model=models["student"],
            teacher_model=models["teacher"],
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(conversations(size)),
        )
        held, ends = before.extra_mib(), []
        meter = Meter(options.device)

        class Clock(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append(meter.now()[0])

        trainer.add_callback(Clock())
        trainer.train()
    took = [after - start for start, after in zip(ends, ends[1:], strict=False)][size["warmup"] - 1 :]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"seconds": statistics.median(took), "loss": losses[0]}
    if torch.cuda.is_available():
        found |= {"extra_mib": meter.extra_mib(), "models_mib": held}
    return found


def random_model(side: str, tokenizer: Any, options: argparse.Namespace) -> Any:
    """A model of random weights in the shape of a published one; the teacher in bfloat16 on a GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = json.loads((ARCHITECTURES / SHAPES[side]).read_text()) | (QUICK_SHAPE if options.quick else {})
    for name in ("architectures", "dtype"):
        sizes.pop(name)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**{**sizes, **special})
    dtype = torch.bfloat16 if side == "teacher" and options.device == "cuda" else torch.float32
    with torch.random.fork_rng(), torch.device(options.device):
        torch.manual_seed(len(side))
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


# ---- What is shown


def table(records: list[Record]) -> str:
    columns = list(dict.fromkeys(key for record in records for key in record if key not in ("name", "failed")))
    lines = [f"| {' | '.join(['', *columns])} |", "|---" * (1 + len(columns)) + "|"]
    for record in records:
        failed = [f"not measured: {record['failed']}"] if "failed" in record else []
        cells = failed or [shown(record.get(key)) for key in columns]
        lines.append(f"| {' | '.join([record['name'], *cells])} |")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def sizes_line(quick: bool) -> str:
    loss, step = (QUICK_LOSS, QUICK_STEP) if quick else (LOSS, STEP)
    toy = "TOY SIZES, which say nothing about speed. " if quick else ""
    return f"{toy}Loss: {loss}. Steps: {step}, shapes of {', '.join(SHAPES.values())}, random weights."


if __name__ == "__main__":
    started = time.monotonic()
    main()
    if "--only" not in sys.argv:
        print(f"{time.monotonic() - started:.0f} s in all.")
