"""What can be refused about a recipe before a weight is loaded: a dry run and a run go through the same checks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigurationError
from ..storage import check_folder
from .parse import Recipe, RecipeArguments

if TYPE_CHECKING:
    from ..trainers.preflight import Ready


@dataclass
class CheckedRecipe:
    """What the checks have read: datasets as they are, configs as student and teacher will have them.

    Args:
        candidates: shapes of a student of so many `parameters`, of which a run takes the one that loses least.
    """

    ready: Ready
    student_config: Any
    teacher_config: Any
    candidates: list[Any] = field(default_factory=list)


def check_recipe(recipe: Recipe) -> CheckedRecipe:
    """Read configs, tokenizers and datasets, and see that all of it fits together; a teacher's server is asked.

    Raises:
        ConfigurationError, DatasetError, VocabularyError: what has to be fixed.
    """
    from ..data import load_split
    from ..run_files import STUDENT_INIT_NAME
    from ..teachers.base import Pair
    from ..teachers.loading import has_files, kind_of
    from ..trainers.given.quantized import check_quantized
    from ..trainers.hidden_states import check_hidden_states
    from ..trainers.preflight import Given, preflight

    settings, args = recipe.run, recipe.args
    student, teacher = student_and_teacher(recipe)
    args.resume_from_checkpoint = checkpoint_to_resume(args)
    teacher_config = _config(str(teacher), "teacher", recipe) if has_files(teacher, args) else None
    student_config = _config(student, "student", recipe)
    student_config, tried = made_config(student_config, recipe)
    if recipe.model.use_peft:
        without_weights(student_config, recipe, adapted=True)  # it must find the modules that it is for
    if settings.student_init:
        check_quantized(student, student_config, args)
        check_hidden_states(args, student_config, lambda: teacher_config, kind_of(teacher, args))
        _check_widths(args, teacher_config, tried)
    text = None
    if settings.pretraining_dataset:
        text = load_split(settings.pretraining_dataset, split=settings.pretraining_split)
    train, evaluation = load_datasets(recipe)
    quantized = recipe.model.load_in_4bit or recipe.model.load_in_8bit
    base = recipe.model.model_name_or_path or str(Path(args.output_dir) / STUDENT_INIT_NAME)
    pair = Pair(student, teacher, adapted=recipe.model.use_peft)
    ready = preflight(Given(pair, args, train, evaluation, text, quantized, base))
    _ask_server(ready, student_config)
    return CheckedRecipe(ready, student_config, teacher_config, tried)


def _check_widths(args: Any, teacher: Any, tried: Sequence[Any]) -> None:
    """Refuse a plan that may end in a width that has no hidden states to compare, before it is measured."""
    widths, whole = {c.shape.hidden_size for c in tried}, teacher.get_text_config(decoder=True).hidden_size
    if args.hidden_weight and widths - {whole}:
        raise ConfigurationError(
            f"Got `hidden_weight: {args.hidden_weight:g}` with `parameters` so few that narrower students, of "
            f"{sorted(widths - {whole})}, would be tried too; expected the teacher's width, {whole}. Ask for more "
            "parameters, set sizes yourself (`keep_layers`, `intermediate_size`), or leave `hidden_weight` out."
        )


def _ask_server(ready: Ready, student_config: Any) -> None:
    """Hold a teacher that needs no weights here, such as one behind HTTP, against the student, and let it go again."""
    from ..teachers.loading import each_teacher, kind_of, pair_of

    args, pair, rows = ready.given.args, ready.pair, student_config.get_text_config().vocab_size
    for name, member in each_teacher(pair.teacher, args):
        pair_of_it, options = pair_of(pair, name, member), member.options
        pair_of_it = pair_of_it.of_ids() if options.has_own_tokenizer else pair_of_it
        kind = kind_of(member.given, options)
        teacher = None if options.teacher_cache else kind.opened(pair_of_it, options)
        if teacher is not None:
            with contextlib.closing(teacher):
                if not options.has_own_tokenizer:
                    teacher.shared_ids(pair.tokenizer, rows, pair_of_it.teacher_tokenizer)


def student_and_teacher(recipe: Recipe) -> tuple[str, Any]:
    """Name both models; several teachers are a mapping. A student made from its teacher goes by the teacher's name."""
    teacher: Any = recipe.run.teachers or recipe.run.teacher_model_name_or_path
    return recipe.model.model_name_or_path or str(teacher), teacher


def load_datasets(recipe: Recipe) -> tuple[Any, Any]:
    """Load training and evaluation rows as the recipe names them."""
    return datasets_of(recipe.run, recipe.args.seed)


def datasets_of(settings: RecipeArguments, seed: int) -> tuple[Any, Any]:
    """Load training and evaluation rows; the latter are None where none are held out.

    Args:
        seed: of the draw of `eval_fraction`.
    """
    from ..data import load_split, train_eval_split

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
        train, evaluation = train_eval_split(train, held_out, seed)
    if settings.max_train_samples:
        train = train.take(settings.max_train_samples)
    return train, evaluation


def checkpoint_to_resume(args: Any) -> str | None:
    """Find the checkpoint that `resume_from_checkpoint` means: true takes the newest complete one.

    Raises:
        ConfigurationError: it is not there, is incomplete, or was written without what a run needs to go on.
    """
    from ..exceptions import CheckpointError
    from ..run_files import check_resumable, is_complete, last_complete_checkpoint

    setting = args.resume_from_checkpoint
    if setting in (None, False) or str(setting).lower() == "false":
        return None
    try:
        folder = last_complete_checkpoint(args.output_dir) if str(setting).lower() == "true" else setting
        check_resumable(folder)
    except CheckpointError as error:
        raise ConfigurationError(str(error)) from error
    if not is_complete(folder):
        raise ConfigurationError(
            f"Got `resume_from_checkpoint: {setting}`; expected the folder of a complete checkpoint, such as "
            f"{Path(args.output_dir) / 'checkpoint-500'}, or `true` for the newest one of `output_dir`."
        )
    return str(folder)


def refuse_to_start_over(args: Any) -> None:
    """Refuse a run that would start anew in a folder that has checkpoints, unless it says so.

    Raises:
        ConfigurationError: naming the newest checkpoint, and both ways to go on.
    """
    from ..run_files import find_last_complete_checkpoint

    check_folder("output_dir", args.output_dir, writable=False)
    found = None if args.resume_from_checkpoint or args.overwrite_output_dir else args.output_dir
    if found is not None and (found := find_last_complete_checkpoint(found)) is not None:
        raise ConfigurationError(
            f"Got `output_dir: {args.output_dir}`, which has checkpoints (the newest is {Path(found).name}), and no "
            "`resume_from_checkpoint`; expected to be told whether to go on. Add `--resume_from_checkpoint true` to go "
            "on, or `--overwrite_output_dir true` to start anew."
        )


def _config(name: str, role: str, recipe: Recipe) -> Any:
    from ..models import load_config

    return load_config(name, role, **recipe.args.files_of(role))


def made_config(config: Any, recipe: Recipe) -> tuple[Any, list[Any]]:
    """Turn the teacher's config into that of a student which is made from it; others stay.

    Returns:
        The config, and the shapes of a plan that are still to be tried, of which it has the one in the middle.

    Raises:
        ConfigurationError: the teacher cannot have such a student.
    """
    from ..manifest import is_whole
    from ..run_files import STUDENT_INIT_NAME
    from ..students import StudentInit

    if not recipe.run.student_init:
        return config, []
    made = Path(recipe.args.output_dir) / STUDENT_INIT_NAME
    init = StudentInit.from_dict(recipe.run.student_init)  # type: ignore[arg-type]  # a dict by now
    if init.parameters is not None and is_whole(made, student_identity(recipe)):
        return _config(str(made), "student", recipe), []
    return config, init.shrink(config, trust_remote_code=recipe.args.trust_remote_code)


def student_identity(recipe: Recipe) -> dict[str, Any]:
    """What a student that is made from its teacher depends on: among others, the teacher's revision and dtype."""
    from ..models import settled_kwargs

    name = "teacher_model_init_kwargs"
    kwargs = settled_kwargs(getattr(recipe.args, name), name)
    # No others: a token among them is nothing to be written down.
    weights = {key: str(kwargs[key]) for key in ("revision", "subfolder", "variant", "dtype") if key in kwargs}
    how = {name: weights} if weights else {}
    return {"teacher": recipe.run.teacher_model_name_or_path, **how, **recipe.run.student_init}  # type: ignore[dict-item]


def without_weights(config: Any, recipe: Recipe, *, adapted: bool = False) -> Any:
    """Make the model of a config on the meta device; `adapted`: with the recipe's adapter, if it has one."""
    import torch
    from transformers.initialization import no_init_weights
    from trl import get_peft_config

    from .. import models
    from ..trainers.given.quantized import check_adapter

    model = models.without_weights(config, trust_remote_code=recipe.args.trust_remote_code)
    adapter = get_peft_config(recipe.model) if adapted else None
    check_adapter(recipe.args, adapter)
    if adapter is None:
        return model
    with torch.device("meta"), models.whole_loading(), no_init_weights():
        return models.add_adapter(model, adapter)


def optimiser_steps(
    args: Any, rows: int | None, processes: int | None = None, tokens: Sequence[int] | None = None
) -> int:
    """Count optimiser steps of a run over so many rows (None: a stream, which needs max_steps).

    Args:
        processes, tokens: as of `steps_of_epoch`.
    """
    if args.max_steps > 0 or rows is None:
        return max(0, args.max_steps)
    return math.ceil(steps_of_epoch(args, rows, processes, tokens) * args.num_train_epochs)


def steps_of_epoch(args: Any, rows: int, processes: int | None = None, tokens: Sequence[int] | None = None) -> int:
    """Count optimiser steps of one pass over so many rows.

    Args:
        processes: of the run; by default those of this launch.
        tokens: of rows (`row_tokens`), for batches that are counted in tokens. If they are of some rows alone, the
            others are taken to be like them; without any, all are taken to be as long as rows may be.
    """
    from ..trainers.given.token_batches import copies_of_row, token_batches

    world, accumulated = processes or args.world_size, args.gradient_accumulation_steps
    if args.per_device_train_tokens is not None:
        most = args.per_device_train_tokens // copies_of_row(args)
        known = [max(1, min(most, count)) for count in tokens or [args.row_limit]]
        every = [known[row % len(known)] for row in range(rows)]
        return math.ceil(len(token_batches(every, args, world)) / (world * accumulated))
    rows *= getattr(args, "num_generations", 1)
    window = args.per_device_train_batch_size * accumulated * world
    batches = math.ceil(rows / (args.per_device_train_batch_size * world))
    if getattr(args, "reuses_rollouts", False):  # whole steps only, each as often as there are inner epochs
        return rows // window * args.num_inner_epochs
    return math.ceil(batches / accumulated)
