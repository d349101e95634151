"""What a recipe is going to do, worked out without loading a weight: `--dry_run`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..escaping import terminal
from ..recipe.checks import (
    CheckedRecipe,
    check_recipe,
    optimiser_steps,
    refuse_to_start_over,
    steps_of_epoch,
    without_weights,
)
from ..recipe.parse import Recipe
from ..redaction import redacted

if TYPE_CHECKING:
    from ..trainers.preflight import Ready


@dataclass
class Plan:
    """Sizes are in parameters, tokens and MiB (per process, unsharded)."""

    method: str
    student: str
    student_parameters: int
    trainable_parameters: int
    teacher: str
    teacher_parameters: int
    teacher_place: str
    train_rows: int | None
    train_tokens: int | None
    eval_rows: int | None
    text_rows: int | None
    steps: int
    tokens_per_step: float | None
    memory_mib: dict[str, float] = field(default_factory=dict)
    disk_free_mib: float = 0.0
    teacher_cache: str = ""
    tried: list[str] = field(default_factory=list)
    quantized: str = ""
    steps_are_estimated: bool = False


def make_plan(recipe: Recipe) -> Plan:
    """Check models' configs, tokenizers and data as a run would, and estimate its size.

    Raises:
        ConfigurationError, DatasetError, VocabularyError: as the run itself would.
    """
    from ..models import num_parameters
    from ..teachers.base import named
    from ..teachers.loading import each_teacher, kind_of
    from ..trainers.given.token_batches import row_tokens

    settings, args = recipe.run, recipe.args
    refuse_to_start_over(recipe.args)
    checked = check_recipe(recipe)
    train, evaluation, text = checked.ready.rows()
    cache, without_teacher = _teacher_cache(checked.ready, (train, evaluation))
    teacher = checked.ready.pair.teacher
    place = kind_of(teacher, args).place
    several = {name: str(named(member.given)) for name, member in each_teacher(teacher, args) if name}
    told = "; ".join(f"{name}: {given}" for name, given in several.items())

    teacher_size = 0
    if checked.teacher_config is not None:
        teacher_size = num_parameters(without_weights(checked.teacher_config, recipe))
    student = without_weights(checked.student_config, recipe, adapted=True)
    student_size, trainable = num_parameters(student), num_parameters(student, trainable_only=True)
    lengths = train["length"][:] if hasattr(train, "__len__") else None
    window, tokens = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size, None
    if args.per_device_train_tokens is not None:
        tokens = row_tokens(train, args, sampled=args.answers_prompts("train", checked.ready.wants))
        window = len(tokens) / steps_of_epoch(args, len(tokens), tokens=tokens)
    steps = optimiser_steps(args, None if lengths is None else len(lengths), tokens=tokens)
    output = Path(args.output_dir).absolute()
    existing = next(place for place in (output, *output.parents) if place.exists())
    return Plan(
        method=settings.method,
        student=_student_name(recipe),
        student_parameters=student_size,
        trainable_parameters=trainable,
        teacher=", ".join(several) or str(teacher or place or "no teacher"),
        teacher_parameters=teacher_size,
        teacher_place=told if several else f"{place}; it answers and fits" if place else "none",
        train_rows=None if lengths is None else len(lengths),
        train_tokens=None if lengths is None else sum(lengths),
        eval_rows=None if evaluation is None else len(evaluation),
        text_rows=None if text is None else len(text),
        steps=steps,
        tokens_per_step=sum(lengths) / len(lengths) * window if lengths else None,
        memory_mib=_memory(recipe, checked, cached=without_teacher),
        disk_free_mib=shutil.disk_usage(existing).free / 2**20,
        teacher_cache=cache,
        tried=[str(candidate) for candidate in checked.candidates],
        quantized=_quantized(student, args),
        steps_are_estimated=tokens is not None and args.max_steps <= 0 and checked.ready.wants.replaces_completions,
    )


def print_plan(plan: Plan) -> None:
    """Print the plan as a table."""
    from rich.console import Console
    from rich.table import Table

    from ..doctor.printing import gib

    title = redacted(f"{plan.method}: {plan.teacher} → {plan.student}")
    table = Table("", "plan", title=terminal(title, "italic"), show_header=False)
    unknown = "unknown (stream)"
    table.add_row("Student", f"{plan.student_parameters:,} parameters, {plan.trainable_parameters:,} trained")
    if plan.quantized:
        table.add_row("Student, quantised", plan.quantized)
    for number, shape in enumerate(plan.tried, 1):
        table.add_row(f"Shape {number} of {len(plan.tried)} to be tried", shape)
    frozen = plan.teacher_parameters
    table.add_row("Teacher", f"{frozen:,} parameters, frozen" if frozen else plan.teacher_place)
    table.add_row("Training rows", unknown if plan.train_rows is None else f"{plan.train_rows:,}")
    table.add_row("Training tokens per epoch", unknown if plan.train_tokens is None else f"{plan.train_tokens:,}")
    table.add_row("Evaluation rows", "none" if plan.eval_rows is None else f"{plan.eval_rows:,}")
    if plan.text_rows is not None:
        table.add_row("Rows of plain text", f"{plan.text_rows:,}")
    about = " (an estimate: the teacher's completions may be shorter)" if plan.steps_are_estimated else ""
    table.add_row("Optimiser steps", f"{plan.steps:,}{about}")
    if plan.tokens_per_step is not None:
        table.add_row("Tokens per step", f"{plan.tokens_per_step:,.0f}")
    for name, size in plan.memory_mib.items():
        table.add_row(f"Memory: {name}", gib(size * 2**20))
    if plan.memory_mib:
        table.add_row("Memory: peak of one process, unsharded", gib(sum(plan.memory_mib.values()) * 2**20))
    table.add_row("Free disk for output_dir", gib(plan.disk_free_mib * 2**20))
    if plan.teacher_cache:
        table.add_row("Teacher cache", terminal(plan.teacher_cache))
    Console().print(table)
    if plan.tried:
        print(
            "The student's shape is the one of those above that loses least on training data before it is trained. A "
            "run tries them when it starts; so does `distill-trainers prune`. Sizes here are of one in the middle."
        )
    print("Everything that can be checked without weights is in order; nothing was trained.")


def _teacher_cache(ready: Ready, datasets: Sequence[Any]) -> tuple[str, bool]:
    """What the cache lacks and how much room that will take, and whether the teacher stays out of memory."""
    from ..teachers.cache.opening import missing_from_cache
    from ..teachers.rows import dataset_rows

    args, wants = ready.given.args, ready.wants
    if args.teacher_cache is None:
        return "", False
    if wants.replaces_completions:
        return f"in {args.teacher_cache}; its size is known once the teacher has written its completions", False
    known = [dataset_rows(dataset) for dataset in datasets if hasattr(dataset, "__len__")]
    rows, tokens, size = missing_from_cache(ready.pair, args, chain.from_iterable(known))
    if not rows:
        return f"complete in {args.teacher_cache}", not wants.samples_completions
    return f"{rows:,} rows with {tokens:,} tokens to come, about {size / 2**20:,.0f} MiB in {args.teacher_cache}", False


def _memory(recipe: Recipe, checked: CheckedRecipe, *, cached: bool) -> dict[str, float]:
    """The parts of one process's peak in MiB, unsharded (see `doctor.memory`)."""
    from ..doctor import Launch
    from ..doctor.memory import OF_STUDENT
    from ..doctor.reading import case_of
    from ..doctor.room import memory_of

    launch = Launch(on_cpu=recipe.args.device.type == "cpu")
    case, _ = case_of(recipe, launch, checked=checked)
    own = case.placement if case.placement in OF_STUDENT else "replicate"
    need = memory_of(case, placement="cached" if cached else own)
    if need is None:
        return {}
    parts = {**need.held, **{f"{name} ({need.highest})": size for name, size in need.moments[need.highest].items()}}
    return {name: size / 2**20 for name, size in parts.items()}


def _quantized(student: Any, args: Any) -> str:
    """What of a student becomes integers, and how large its folder is before and after."""
    from ..models import quantized_sizes
    from ..trainers.given.quantized import group_size_of

    if args.quantize_student is None:
        return ""
    group_size = group_size_of(args)
    sizes = quantized_sizes(student, group_size)
    return (
        f"{args.quantize_student} in groups of {group_size}: {sizes['parameters']:,} parameters of "
        f"{sizes['layers']} linear layers; {sizes['float32']:,} bytes in float32, {sizes['integers']:,} as integers "
        f"({'one to a byte' if args.quantize_student == 'int4' else 'with their scales'})"
    )


def _student_name(recipe: Recipe) -> str:
    from ..students import made_of

    if recipe.model.model_name_or_path:
        return recipe.model.model_name_or_path
    return made_of(recipe.run.student_init, "the teacher")  # type: ignore[arg-type]
