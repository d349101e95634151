"""What can be refused about a recipe before a weight is loaded: a dry run and a run go through the same checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..exceptions import ConfigurationError
from .parse import Recipe


@dataclass
class CheckedRecipe:
    """What the checks have read: datasets as they are, configs as student and teacher will have them."""

    train: Any
    evaluation: Any
    teacher_config: Any
    student_config: Any
    tokenizer: Any
    teacher_tokenizer: Any
    pretraining: Any = None

    def rows(self, recipe: Recipe) -> tuple[Any, Any]:
        """Training and evaluation rows as the recipe's trainer would tokenise, cut and refuse them."""
        trainer = bare_trainer(recipe, self.pretraining)
        train = trainer.prepare_rows(self.train, self.tokenizer, "train")
        return train, trainer.prepare_rows(self.evaluation, self.tokenizer, "eval")


def check_recipe(recipe: Recipe) -> CheckedRecipe:
    """Read configs, tokenizers and datasets, and see that all of it fits together.

    Raises:
        ConfigurationError, DatasetError, VocabularyError: what has to be mended.
    """
    from ..data import load_split
    from ..rollouts import check_engine
    from ..run_files import STUDENT_INIT_NAME
    from ..teachers import shared_vocabulary
    from ..teachers.base import is_remote
    from ..trainers import student as sources
    from ..trainers.lifecycle import cache_filling as caching
    from ..trainers.lifecycle import outage as remote
    from ..trainers.lifecycle import publishing

    settings, args = recipe.run, recipe.args
    names: Any = student_and_teacher(recipe)
    student_name, teacher_name = names
    args.resume_from_checkpoint = checkpoint_to_resume(args)
    remote_teacher = is_remote(teacher_name)
    teacher_config = _config(teacher_name, "teacher", recipe) if teacher_name and not remote_teacher else None
    student_config = _config(student_name, "student", recipe)
    if settings.student_init:
        _cut_layers(student_config, settings.student_init["keep_layers"])  # type: ignore[index, arg-type]  # a dict
    if recipe.model.use_peft:
        without_weights(student_config, recipe, adapted=True)  # it must find the modules that it is for
    pretraining = None
    if settings.pretraining_dataset:
        pretraining = load_split(settings.pretraining_dataset, split=settings.pretraining_split)
    trainer = bare_trainer(recipe, pretraining)
    adapted = recipe.model.use_peft
    sources.check(student_name, teacher_name, args, trainer.needs, trainer.accepts_encoder_decoders, adapted)
    base = recipe.model.model_name_or_path or str(Path(args.output_dir) / STUDENT_INIT_NAME)
    publishing.check(args, base, recipe.model.use_peft, recipe.model.load_in_4bit or recipe.model.load_in_8bit)
    train, evaluation = load_datasets(recipe)
    trainer.check_datasets(train, evaluation)
    caching.check(trainer, teacher_name, train)
    remote.check(trainer, teacher_name)
    if trainer.samples_completions:
        check_engine(args.rollout_engine, args.vllm_kwargs)  # type: ignore[arg-type]  # parsed by now
    tokenizer = sources.student_tokenizer(student_name, args)
    teacher_tokenizer = sources.teacher_tokenizer(teacher_name, tokenizer, args)
    if teacher_config is not None:
        rows = (student_config.get_text_config().vocab_size, teacher_config.get_text_config().vocab_size)
        shared_vocabulary(tokenizer, teacher_tokenizer, *rows)
    if remote_teacher:
        teacher = remote.connected(teacher_name, tokenizer, args)
        sources.ids_shared_with_server(teacher, tokenizer, student_config.get_text_config().vocab_size)
        teacher.close()
    return CheckedRecipe(train, evaluation, teacher_config, student_config, tokenizer, teacher_tokenizer, pretraining)


def student_and_teacher(recipe: Recipe) -> tuple[str, str | None]:
    """Names of both models; a student that is made from its teacher goes by the teacher's."""
    teacher = recipe.run.teacher_model_name_or_path
    return recipe.model.model_name_or_path or str(teacher), teacher


def bare_trainer(recipe: Recipe, pretraining: Any = None) -> Any:
    """The recipe's trainer without models: what it asks of its datasets depends on its settings alone."""
    from ..trainers import METHODS

    trainer_class = METHODS[recipe.run.method][1]
    trainer: Any = trainer_class.__new__(trainer_class)
    trainer.args = recipe.args
    if pretraining is not None:
        trainer.pretraining_dataset = pretraining
    return trainer


def load_datasets(recipe: Recipe) -> tuple[Any, Any]:
    """Training and evaluation rows as the recipe names them."""
    from ..data import load_split, train_eval_split

    settings = recipe.run
    train = load_split(
        settings.dataset,  # type: ignore[arg-type]
        name=settings.dataset_config,
        split=settings.dataset_split,
        streaming=settings.streaming,
    )
    evaluation = None
    if settings.eval_dataset:
        evaluation = load_split(settings.eval_dataset, name=settings.dataset_config, split=settings.eval_split)
    elif settings.eval_fraction:
        held_out = settings.eval_fraction if settings.eval_fraction < 1 else int(settings.eval_fraction)
        train, evaluation = train_eval_split(train, held_out, recipe.args.seed)
    if settings.max_train_samples:
        train = train.take(settings.max_train_samples)
    return train, evaluation


def checkpoint_to_resume(args: Any) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: true takes the newest complete one.

    Raises:
        ConfigurationError: it is not there, is incomplete, or was written without what a run needs to go on.
    """
    from ..exceptions import CheckpointError
    from ..run_files import check_resumable, is_complete, last_complete_checkpoint

    asked = args.resume_from_checkpoint
    if asked in (None, False) or str(asked).lower() == "false":
        return None
    try:
        folder = last_complete_checkpoint(args.output_dir) if str(asked).lower() == "true" else asked
        check_resumable(folder)
    except CheckpointError as error:
        raise ConfigurationError(str(error)) from error
    if not is_complete(folder):
        raise ConfigurationError(
            f"Got `resume_from_checkpoint: {asked}`; expected the folder of a complete checkpoint, such as "
            f"{Path(args.output_dir) / 'checkpoint-500'}, or `true` for the newest one of `output_dir`."
        )
    return str(folder)


def _config(name: str, role: str, recipe: Recipe) -> Any:
    from ..models import load_config

    return load_config(name, role, trust_remote_code=recipe.args.trust_remote_code)


def _cut_layers(config: Any, keep: int | list[int]) -> None:
    from ..students import kept_layers

    text = config.get_text_config()
    kept = kept_layers(text.num_hidden_layers, keep)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i] for i in kept]
    text.num_hidden_layers = len(kept)


def without_weights(config: Any, recipe: Recipe, *, adapted: bool = False) -> Any:
    """The model that a config describes, on the meta device; `adapted`: with the recipe's adapter, if it has one."""
    import torch
    from trl import get_peft_config

    from ..models import add_adapter, model_class, whole_loading

    with torch.device("meta"), whole_loading():
        model = model_class(config).from_config(config, trust_remote_code=recipe.args.trust_remote_code)
        adapter = get_peft_config(recipe.model) if adapted else None
        return model if adapter is None else add_adapter(model, adapter)


def optimiser_steps(args: Any, rows: int | None, processes: int | None = None) -> int:
    """Optimiser steps of a run over so many rows (None: a stream, which needs max_steps).

    Args:
        processes: of the run; by default those of this launch.
    """
    world = processes or args.world_size
    if args.max_steps > 0 or rows is None:
        return max(0, args.max_steps)
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    batches = math.ceil(rows / (args.per_device_train_batch_size * world))
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    if getattr(args, "reuses_rollouts", False):  # whole steps only, each as often as there are inner epochs
        per_epoch = rows // window * args.num_inner_epochs
    return math.ceil(per_epoch * args.num_train_epochs)
