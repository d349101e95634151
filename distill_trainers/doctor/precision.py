"""Is the precision what the user thinks it is?"""

from __future__ import annotations

from collections.abc import Iterator

from ..models.precision import products_of
from .case import Case
from .findings import Finding, error, note, warning

_CLEARLY = 1.2  # times as fast; smaller differences are within what a shared machine shows


def check_precision(case: Case) -> Iterator[Finding]:
    """Check the dtypes of both models against the launch and the trainer's own setting."""
    args, launch = case.args, case.launch
    mode = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if launch.name and launch.mixed_precision != mode and not (launch.mixed_precision == "no" and launch.on_cpu):
        yield warning(
            "precision",
            f"The recipe trains with mixed precision {mode!r}, the launch configuration {launch.name!r} says "
            f"{launch.mixed_precision!r}.",
            f"Say the same in both: `{launch.mixed_precision}: true` in the recipe, or `mixed_precision: {mode}` in "
            "the launch configuration."
            if launch.mixed_precision != "no"
            else f"Say the same in both: `mixed_precision: {mode}` in the launch configuration.",
        )
    elif mode == "no" and not launch.on_cpu and case.student_dtype == "float32":
        yield warning(
            "precision",
            "The student is trained in float32 on GPUs: twice the memory of activations, and several times slower.",
            "Set `bf16: true` (`fp16: true` on GPUs older than Ampere).",
        )
    several = [(teacher.shape, teacher.dtype) for teacher in case.teachers.values() if not teacher.shares]
    teachers = several or [(case.teacher_shape, case.teacher_dtype)]
    narrow = [
        setting
        for setting, used in (
            ("bf16: false", mode == "bf16"),
            ("teacher_model_init_kwargs: {dtype: float32}", any(dtype == "bfloat16" for _, dtype in teachers)),
            ("dtype: float32", case.student_dtype == "bfloat16"),
        )
        if used
    ]
    if launch.on_cpu:
        products = products_of(case.student_config)
        if narrow and products.float32 > _CLEARLY * products.bfloat16:
            yield warning(
                "precision",
                f"This processor multiplies slower in bfloat16: {products}.",
                f"Set {', '.join(f'`{setting}`' for setting in narrow)}, or `bf16: auto`.",
            )
        elif mode == "no" and products.bfloat16 > _CLEARLY * products.float32:
            yield note(
                "precision",
                f"This processor multiplies faster in bfloat16: {products}.",
                "Set `bf16: true`, or `bf16: auto`. Weights stay float32; sums of products round to 8 bits.",
            )
    full = not case.peft
    if full and case.student_dtype == "float16" and not launch.by_deepspeed:
        yield error(
            "precision",
            "The student's weights are loaded in float16 and all of them are trained: the gradient scaler refuses "
            "float16 gradients.",
            "Set `dtype: float32` and `fp16: true`, which keeps float32 weights.",
        )
    elif full and case.student_dtype == "bfloat16" and not launch.by_deepspeed:
        yield warning(
            "precision",
            f"The student's weights are bfloat16 and are trained as such: steps of {args.learning_rate:g} are mostly "
            "below the 8 bits of a weight and are rounded away.",
            "Leave `dtype` out (float32 weights with `bf16: true`), use a DeepSpeed launch, which keeps float32 "
            "weights, or train an adapter.",
        )
    wide = sum(shape.parameters for shape, dtype in teachers if shape is not None and dtype == "float32")
    if wide and mode != "no" and not launch.on_cpu:
        whose = "Teachers are" if several else "The teacher is"
        yield warning(
            "precision",
            f"{whose} loaded in float32 ({wide * 4 / 1e9:,.1f} GB) although the run computes in {mode}.",
            "Set `teacher_model_init_kwargs: {dtype: bfloat16}`.",
        )
