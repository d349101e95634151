"""Recipes: one YAML file that names the method, the models, the data and every setting that is not the default."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigurationError, refuse_unknown_keys

if TYPE_CHECKING:
    from trl import ModelConfig

    from ..trainers import DistillConfig


@dataclass
class RecipeArguments:
    """What a run needs beside the method's own config and TRL's `ModelConfig` (which names the student)."""

    method: str = field(default="gkd", metadata={"help": "Method of the recipe: one of the keys of METHODS."})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Teacher: a folder or Hub id."})
    student_init: dict | str | None = field(
        default=None,
        metadata={"help": "Make the student from the teacher, such as {from_teacher: true, keep_layers: 12} (JSON)."},
    )
    dataset: str | None = field(default=None, metadata={"help": "Training data: a file, a folder or a Hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Evaluation data, named like `dataset`."})
    eval_split: str = field(default="test", metadata={"help": "Split of a Hub `eval_dataset`."})
    eval_fraction: float | None = field(
        default=None, metadata={"help": "Without `eval_dataset`: hold out this share (below 1) or number of rows."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only the first rows of the training data."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the training data as a stream (needs max_steps)."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check everything, print the plan, load no weights."})

    def __post_init__(self) -> None:
        if isinstance(self.student_init, str):
            try:
                self.student_init = json.loads(self.student_init)
            except json.JSONDecodeError as error:
                raise ConfigurationError(f"`student_init` is not valid JSON: {error}.") from error


@dataclass
class Recipe:
    """A parsed recipe."""

    run: RecipeArguments
    args: DistillConfig
    model: ModelConfig


def parse_recipe(argv: Sequence[str]) -> Recipe:
    """Parse `--config recipe.yaml` and overrides on the command line.

    Raises:
        ConfigurationError: no such file, not a mapping, unknown or contradictory keys, an unknown method.
    """
    from trl import ModelConfig, TrlParser

    argv = list(argv)
    recipe = _read_yaml(argv)
    method = _method(recipe, argv)
    config_class = _methods()[method][0]
    classes: tuple[Any, ...] = (RecipeArguments, config_class, ModelConfig)
    known = {f.name for cls in classes for f in fields(cls) if f.init} | {"env"}
    refuse_unknown_keys(recipe, known, "the recipe")
    options = [a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")]
    refuse_unknown_keys([o for o in options if not o.startswith("no_")], known | {"config", "help"}, "the command line")
    parser = TrlParser(classes, prog="distill-trainers train", allow_abbrev=False)
    try:
        run, args, model = parser.parse_args_and_config(argv)
    except ConfigurationError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"The recipe could not be read: {error}") from error
    recipe_ = Recipe(run, args, model)
    _refuse_contradictions(recipe_)
    return recipe_


def _methods() -> dict[str, Any]:
    from ..trainers import METHODS

    return METHODS


def _read_yaml(argv: list[str]) -> dict[str, Any]:
    import yaml

    if "--config" not in argv:
        return {}
    position = argv.index("--config") + 1
    if position >= len(argv):
        raise ConfigurationError("Got `--config` without a file; expected `--config recipes/….yaml`.")
    path = Path(argv[position])
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigurationError(f"There is no recipe {str(path)!r}. Recipes in that folder: {near or 'none'}.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"The recipe {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ConfigurationError(
            f"The recipe {str(path)!r} holds {type(recipe).__name__}; expected `key: value` lines."
        )
    return recipe


def _method(recipe: dict[str, Any], argv: list[str]) -> str:
    method = recipe.get("method", "gkd")
    for position, argument in enumerate(argv):
        if argument == "--method" and position + 1 < len(argv):
            method = argv[position + 1]
        elif argument.startswith("--method="):
            method = argument.split("=", 1)[1]
    if method not in _methods():
        raise ConfigurationError(f"Got `method: {method}`; expected one of {', '.join(_methods())}.")
    return method


def _refuse_contradictions(recipe: Recipe) -> None:
    """What cannot work together, by name, before anything is loaded."""
    run, args, model = recipe.run, recipe.args, recipe.model
    if not run.teacher_model_name_or_path:
        raise ConfigurationError("The recipe names no teacher; set `teacher_model_name_or_path`.")
    if run.student_init and model.model_name_or_path:
        raise ConfigurationError(
            "The recipe sets both `model_name_or_path` and `student_init`: the student is either loaded or made. "
            "Keep one."
        )
    if not run.student_init and not model.model_name_or_path:
        raise ConfigurationError(
            "The recipe names no student; set `model_name_or_path`, or "
            "`student_init: {from_teacher: true, keep_layers: 12}`."
        )
    if not run.dataset:
        raise ConfigurationError("The recipe names no data; set `dataset` to a file, a folder or a Hub id.")
    if run.eval_dataset and run.eval_fraction:
        raise ConfigurationError("The recipe sets both `eval_dataset` and `eval_fraction`. Keep one.")
    if run.streaming and args.max_steps <= 0:
        raise ConfigurationError("`streaming: true` has no length, so set `max_steps` to a positive number.")
    has_eval = bool(run.eval_dataset or run.eval_fraction)
    if run.early_stopping_patience and (not has_eval or args.eval_strategy == "no"):
        raise ConfigurationError(
            "`early_stopping_patience` needs evaluations: set `eval_dataset` or `eval_fraction`, and `eval_strategy`."
        )
    if run.student_init:
        from ..students import StudentInit

        StudentInit.from_dict(dict(run.student_init))  # type: ignore[arg-type]
