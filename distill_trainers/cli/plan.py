"""What a recipe is going to do, worked out without loading a weight: `--dry_run`."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..exceptions import ConfigurationError
from .recipe import Recipe

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class Plan:
    """Sizes are in parameters, tokens and MiB (per process, unsharded)."""

    method: str
    student: str
    student_parameters: int
    trainable_parameters: int
    teacher: str
    teacher_parameters: int
    train_rows: int | None
    train_tokens: int | None
    eval_rows: int | None
    steps: int
    tokens_per_step: float | None
    memory_mib: dict[str, float] = field(default_factory=dict)
    disk_free_mib: float = 0.0


def make_plan(recipe: Recipe, train: Any, evaluation: Any) -> Plan:
    """Check models' configs, tokenizers and data as a run would, and estimate its size.

    Raises:
        ConfigurationError, DatasetError, VocabularyError: as the run itself would.
    """
    from ..models import check_model_source, load_tokenizer
    from ..teachers import shared_vocabulary

    settings, args = recipe.run, recipe.args
    teacher_name = settings.teacher_model_name_or_path
    student_name = recipe.model.model_name_or_path or teacher_name
    check_model_source(teacher_name, "teacher")  # type: ignore[arg-type]
    check_model_source(student_name, "student")  # type: ignore[arg-type]
    teacher_config, student_config = (_config(name, args) for name in (teacher_name, student_name))
    if settings.student_init:
        _cut_layers(student_config, settings.student_init)
    tokenizer = load_tokenizer(student_name, trust_remote_code=args.trust_remote_code)  # type: ignore[arg-type]
    teacher_tokenizer = load_tokenizer(teacher_name, trust_remote_code=args.trust_remote_code)  # type: ignore[arg-type]
    rows = (student_config.get_text_config().vocab_size, teacher_config.get_text_config().vocab_size)
    shared_vocabulary(tokenizer, teacher_tokenizer, *rows)
    train, evaluation = _prepared(recipe, train, tokenizer, "train"), _prepared(recipe, evaluation, tokenizer, "eval")

    teacher_size, _ = _parameters(teacher_config, None)
    student_size, trainable = _parameters(student_config, recipe.model)
    lengths = train["length"] if hasattr(train, "__len__") else None
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps
    if steps <= 0 and lengths is not None:
        per_epoch = math.ceil(
            math.ceil(len(lengths) / (args.per_device_train_batch_size * args.world_size))
            / args.gradient_accumulation_steps
        )
        steps = math.ceil(per_epoch * args.num_train_epochs)
    mean_length = sum(lengths) / len(lengths) if lengths is not None else None
    existing = next(
        p for p in (Path(args.output_dir).absolute(), *Path(args.output_dir).absolute().parents) if p.exists()
    )
    return Plan(
        method=settings.method,
        student=_student_name(recipe),
        student_parameters=student_size,
        trainable_parameters=trainable,
        teacher=str(teacher_name),
        teacher_parameters=teacher_size,
        train_rows=None if lengths is None else len(lengths),
        train_tokens=None if lengths is None else sum(lengths),
        eval_rows=None if evaluation is None else len(evaluation),
        steps=steps,
        tokens_per_step=None if mean_length is None else mean_length * window,
        memory_mib=_memory(recipe, student_config, student_size, trainable, teacher_size),
        disk_free_mib=shutil.disk_usage(existing).free / 2**20,
    )


def print_plan(plan: Plan) -> None:
    """The plan as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "plan", title=f"{plan.method}: {plan.teacher} → {plan.student}", show_header=False)
    unknown = "unknown (stream)"
    table.add_row("Student", f"{plan.student_parameters:,} parameters, {plan.trainable_parameters:,} trained")
    table.add_row("Teacher", f"{plan.teacher_parameters:,} parameters, frozen")
    table.add_row("Training rows", unknown if plan.train_rows is None else f"{plan.train_rows:,}")
    table.add_row("Training tokens per epoch", unknown if plan.train_tokens is None else f"{plan.train_tokens:,}")
    table.add_row("Evaluation rows", "none" if plan.eval_rows is None else f"{plan.eval_rows:,}")
    table.add_row("Optimiser steps", f"{plan.steps:,}")
    if plan.tokens_per_step is not None:
        table.add_row("Tokens per step", f"{plan.tokens_per_step:,.0f}")
    for name, size in plan.memory_mib.items():
        table.add_row(f"Memory: {name}", f"{size:,.0f} MiB")
    table.add_row("Memory: sum, one process, unsharded", f"{sum(plan.memory_mib.values()):,.0f} MiB")
    table.add_row("Free disk for output_dir", f"{plan.disk_free_mib:,.0f} MiB")
    Console().print(table)
    print("Everything that can be checked without weights is in order; nothing was trained.")


def _config(name: Any, args: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)


def _cut_layers(config: Any, student_init: Any) -> None:
    from ..students import even_layers

    keep = student_init["keep_layers"]
    text, wanted = config.get_text_config(), keep if isinstance(keep, int) else len(keep)
    if not 1 <= wanted <= text.num_hidden_layers:
        raise ConfigurationError(
            f"Got `student_init: keep_layers: {keep}`; the teacher has {text.num_hidden_layers} layers to choose from."
        )
    if getattr(text, "layer_types", None):
        kept = keep if isinstance(keep, list) else even_layers(len(text.layer_types), wanted)
        text.layer_types = [text.layer_types[i] for i in kept]
    text.num_hidden_layers = wanted


def _prepared(recipe: Recipe, dataset: Any, tokenizer: Any, name: str) -> Any:
    """Rows as the recipe's trainer would tokenise, cut and refuse them."""
    from ..trainers import METHODS

    trainer_class = METHODS[recipe.run.method][1]
    trainer = trainer_class.__new__(trainer_class)  # what a trainer asks of its rows depends on its settings alone
    trainer.args = recipe.args
    return trainer.prepare_rows(dataset, tokenizer, name)


def _parameters(config: Any, model: Any) -> tuple[int, int]:
    """All and trained parameters, from a model without weights."""
    from transformers import AutoModelForCausalLM
    from trl import get_peft_config

    from ..models import add_adapter, num_parameters

    with torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(config)
        adapter = get_peft_config(model) if model is not None else None
        if adapter is not None:
            built = add_adapter(built, adapter)
    return num_parameters(built), num_parameters(built, trainable_only=True)


def _memory(recipe: Recipe, config: Any, student: int, trainable: int, teacher: int) -> dict[str, float]:
    """A rough estimate per process in MiB: exact for weights, gradients and Adam; activations from the usual rule."""
    args, text = recipe.args, config.get_text_config()
    student_bytes = _BYTES.get(str(recipe.model.dtype), 4)
    teacher_dtype = (args.teacher_model_init_kwargs or {}).get("dtype", "float32")  # type: ignore[union-attr]
    tokens = args.per_device_train_batch_size * args.max_length
    # A layer keeps about 34 bytes per token and hidden unit in 16 bits (arXiv 2205.05198, eq. 1); its input alone, 2,
    # under checkpointing.
    kept = 2 if args.activation_checkpointing else 34
    width = 1 if args.bf16 or args.fp16 else 2
    activations = tokens * text.hidden_size * text.num_hidden_layers * kept * width
    sizes = {
        "student weights": student * student_bytes,
        "gradients and Adam": trainable * (student_bytes + 2 * max(student_bytes, 4)),
        "teacher weights": teacher * _BYTES.get(str(teacher_dtype).removeprefix("torch."), 4),
        "activations at max_length": activations,
        "head: weight gradient and chunks": text.vocab_size * text.hidden_size * 4 + 6 * args.loss_chunk_bytes,
    }
    return {name: size / 2**20 for name, size in sizes.items()}


def _student_name(recipe: Recipe) -> str:
    if recipe.model.model_name_or_path:
        return recipe.model.model_name_or_path
    return f"{recipe.run.student_init['keep_layers']} of its layers"  # type: ignore[index]
