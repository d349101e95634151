"""About how long a step takes: its matrix products at the rate that this device multiplies with.

Products of n tokens of mean length T, in operations (a multiplication and an addition are two):
- student forward F = 2 n (P − embedding) + 2 n T a layers (causal attention, half of the pairs);
- backward 2 F, or F where only an adapter is trained; gradient checkpointing recomputes F without the head;
- teacher forward likewise, on its own view, unless its answers are cached or come from elsewhere;
- rollouts, on the share λ of steps: a forward of prompts and samples, and for each new token one reading of
  all weights; they are taken to be max_new_tokens long, also where they are trained on.

Nothing else is counted: no data loading, no communication, no element-wise work, so that real steps take longer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .case import Case
from .memory import OF_STUDENT
from .shapes import ModelShape


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second of one rank."""

    operations: float
    bytes: float
    source: str


@dataclass(frozen=True)
class Pace:
    """One optimiser step of one rank.

    Attributes:
        operations: of its matrix products.
        seconds: expected at least; None without rates.
        rates: what it was worked out with.
    """

    operations: float
    seconds: float | None
    rates: Rates | None


def pace_of(case: Case, rates: Rates | None) -> Pace | None:
    """Estimate work and least time of one step."""
    student, work = case.student_shape, case.work
    if student is None or work is None:
        return None
    limit = work.length
    share = float(getattr(case.args, "lmbda", 1.0)) if work.rollout_rows else 0.0
    prompt = _mean(case.prompt_lengths, limit) or work.prompt
    sampled = min(limit, prompt + work.new_tokens)
    mean = (1 - share) * (_mean(case.lengths, limit) or limit) + share * sampled
    counted = case.args.per_device_train_tokens  # in tokens, batches are about as full as they may be
    tokens = work.accumulation * (work.rows * mean if counted is None else counted)
    forward = _forward(student, tokens, mean)
    passes = 3.0 if student.trainable == student.parameters else 2.0
    operations = passes * forward + (_forward(student, tokens, mean) - 2 * tokens * student.head) * work.checkpointing
    places = {name: (t.shape, t.placement) for name, t in case.teachers.items()}
    read_by = 1.0 if case.composed else 1 / max(1, len(places))  # the share of rows that each of several reads
    its_mean, its_tokens = mean + work.teacher_more, tokens * (1 + work.teacher_more / mean) if mean else 0.0
    for shape, placement in (places or {"": (case.teacher_shape, case.placement)}).values():
        teacher = student if placement in OF_STUDENT else shape
        if teacher is not None and placement not in ("cached", "remote"):
            operations += read_by * _forward(teacher, its_tokens, its_mean)
    read = 0.0
    if work.rollout_rows:
        calls = max(1.0, work.rows * work.accumulation / work.rollout_rows)
        operations += share * calls * _forward(student, work.rollout_rows * sampled, sampled)
        read = share * calls * work.new_tokens * student.parameters * (2 if work.mixed else work.weight_bytes)
    seconds = None if rates is None else operations / rates.operations + read / rates.bytes
    return Pace(operations, seconds, rates)


def _mean(lengths: Sequence[int], limit: int) -> float:
    return sum(min(length, limit) for length in lengths) / len(lengths) if lengths else 0.0


def _forward(shape: ModelShape, tokens: float, length: float) -> float:
    body = shape.parameters - shape.embedding  # a tied head is used once as an embedding, which multiplies nothing
    return 2 * tokens * body + 2 * tokens * length * shape.attended * shape.layers


def measured_rates(device: Any, dtype: torch.dtype, processes: int = 1) -> Rates:
    """Measure this device: the best of a few products of square matrices, and of a few copies.

    Args:
        processes: ranks that share it.
    """
    device = torch.device(device)
    size, repeats = (8192, 10) if device.type == "cuda" else (1536, 3)
    left = torch.randn(size, size, device=device).to(dtype)
    block = torch.empty(64 * 2**20 if device.type == "cuda" else 16 * 2**20, device=device)
    product = _best(lambda: left @ left, repeats, device)
    copied = _best(lambda: block.clone(), repeats, device)
    return Rates(
        operations=2 * size**3 / product / processes,
        bytes=2 * block.numel() * 4 / copied / processes,
        source=f"measured here: {str(dtype).removeprefix('torch.')} products on {device.type}",
    )


def _best(call: Any, repeats: int, device: torch.device) -> float:
    best = float("inf")
    for _ in range(repeats + 1):  # the first one sets things up
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
