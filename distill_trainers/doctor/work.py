"""What a step computes on one rank, read from a method's settings."""

from __future__ import annotations

from typing import Any

from .. import models
from ..losses.workspace import chunk_bytes_of
from ..teachers import loading
from ..trainers.given.token_batches import copies_of_row, rows_of_batch
from .launch import Launch
from .memory import Workload

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
# Bytes of state per parameter with 4-byte weights; all others keep two moments.
_STATES = {"sgd": 0.0, "adafactor": 0.0, "lion_32bit": 4.0, "adagrad": 4.0, "rmsprop": 4.0}


def workload(
    args: Any,
    method: str,
    launch: Launch,
    *,
    student_dtype: str = "float32",
    frozen_bytes: float | None = None,
    teacher_dtype: str = "float32",
    samples: bool = False,
    longest: int = 1024,
    teacher_more: int = 0,
) -> Workload:
    """Return the workload of a run.

    Args:
        samples: whether steps sample the student's completions.
        longest: row of the data, which counts where `max_length` cuts nothing.
        teacher_more: tokens that rows have for the teacher beyond the student's.
    """
    length = args.max_length or longest
    if args.per_device_train_tokens is not None:
        length = min(length, args.per_device_train_tokens // copies_of_row(args))  # no row may be longer
    rows = rows_of_batch(args, length)
    window = rows * args.gradient_accumulation_steps * getattr(args, "innovation_samples", 1)
    text = 0
    if method == "minillm" and args.pretraining_weight:
        text = args.pretraining_batch_size or 0
    sampled = (args.rollout_batch_size or window * getattr(args, "num_minibatches", 1)) if samples else 0
    return Workload(
        rows=rows * args.sequences_of_row + text,
        length=length,
        accumulation=args.gradient_accumulation_steps,
        checkpointing=models.recomputes_activations(args),
        weight_bytes=BYTES.get(student_dtype, 4.0),
        frozen_bytes=frozen_bytes,
        teacher_bytes=BYTES.get(teacher_dtype, 4.0),
        mixed=bool(args.bf16 or args.fp16) or launch.mixed_precision != "no",
        state_bytes=_state_bytes(str(getattr(args.optim, "value", args.optim))),
        chunk_bytes=chunk_bytes_of(args.loss_chunk_mib, "cpu" if launch.on_cpu else "cuda"),
        rollout_rows=sampled,
        prompt=max(1, length - args.max_new_tokens) if samples else 0,
        new_tokens=args.max_new_tokens if samples else 0,
        teacher_samples=method == "minillm" and args.alpha > 0,
        teacher_more=teacher_more,
        rounded=args.quantize_student is not None,
        matched=args.hidden_weight > 0,
        teacher_sparse=args.teacher_cache is not None and args.teacher_cache_kind != "hidden",
    )


def _state_bytes(optimiser: str) -> float:
    if "8bit" in optimiser or "bnb_8" in optimiser:
        return 2.0
    return _STATES.get(optimiser, 8.0)


def placement_of(args: Any, teacher: str | None, launch: Launch, *, cached: bool, adapted: bool = False) -> str:
    """Tell where the teacher is: what `self_teacher` or `teacher_placement` says, or what follows from the launch.

    Args:
        cached: whether all that a run asks of its teacher is in its cache.
        adapted: whether the student trains an adapter, which `initial` switches off; else it is a copy.
    """
    named = loading.placement_of(teacher, args)
    if named == "initial":
        named = "adapter_off" if adapted else args.teacher_placement
    if named != "auto":
        return named
    if cached:
        return "cached"
    kwargs = args.teacher_model_init_kwargs or {}
    quantised = kwargs.get("quantization_config") or kwargs
    for name, placement in (("load_in_4bit", "quantized-4bit"), ("load_in_8bit", "quantized-8bit")):
        if isinstance(quantised, dict) and quantised.get(name):
            return placement
    if kwargs.get("device_map"):
        return "device_map"
    return launch.strategy if launch.strategy in ("zero3", "fsdp2") else "replicate"
