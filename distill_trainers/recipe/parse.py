"""Recipes: one YAML file that names the method, the models, the data and every setting that is not the default."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..exceptions import ConfigurationError, refuse_unknown_keys
from ..installing import pip_install
from ..settings import Bounds, setting, shown
from ..trl_names import other_names
from ..value_types import (
    check_bounds,
    check_finite,
    check_mappings,
    check_settings,
    check_value_types,
    names_of_mappings,
    parse_mapping,
)
from .environment import set_environment
from .help import arrange
from .known_keys import known_keys, options_with_our_names, with_our_names
from .precision import settle_precision
from .reading import read_settings

if TYPE_CHECKING:
    from trl import ModelConfig

    from ..trainers import DistillConfig


@dataclass
class RecipeArguments:
    """What a run needs beside the method's own config and TRL's `ModelConfig` (which names the student)."""

    method: str = setting("gkd", "Method of the recipe: one of the keys of METHODS.")
    teacher_model_name_or_path: str | None = setting(
        None, "Teacher: a folder, a Hub id, or http://… of its servers; some methods need none."
    )
    teachers: dict | str | None = setting(
        None,
        "In its place several by name, such as {math: org/math-7b, code: {teacher_model_name_or_path: …}} (JSON): each "
        "row has one of them (teacher_column), or a setting makes them one.",
    )
    student_init: dict | str | None = setting(
        None, "Make the student from the teacher: {from_teacher: true, keep_layers: 12}, or {parameters: 3.0e9} (JSON)."
    )
    dataset: str | None = setting(None, "Training data: a file, a folder or a Hub id.")
    dataset_config: str | None = setting(None, "Configuration name of a Hub dataset.")
    dataset_split: str = setting("train", "Split to train on.")
    eval_dataset: str | None = setting(None, "Evaluation data, named like `dataset`.")
    eval_split: str = setting("test", "Split of a Hub `eval_dataset`.")
    eval_fraction: float | None = setting(
        None, "Without `eval_dataset`: hold out this share (below 1) or number of rows."
    )
    pretraining_dataset: str | None = setting(
        None, "Plain text for the language-model loss of minillm: a file, a folder or a Hub id."
    )
    pretraining_split: str = setting("train", "Split of a Hub `pretraining_dataset`.")
    max_train_samples: int | None = setting(
        None, "Use only the first rows of the training data.", least=1, words="1 or more, or leave it out"
    )
    streaming: bool = setting(False, "Read the training data as a stream (needs max_steps).")
    early_stopping_patience: int | None = setting(
        None,
        "Stop after so many evaluations without a better metric_for_best_model.",
        least=1,
        words="1 or more, or leave it out",
    )
    doctor: bool = setting(True, "Before runs of 100 steps and more, look for what would go wrong.")
    dry_run: bool = setting(False, "Check everything, print the plan, load no weights.")


@dataclass
class Recipe:
    """A parsed recipe."""

    run: RecipeArguments
    args: DistillConfig
    model: ModelConfig
    extra: Any = None


def parse_recipe(
    argv: Sequence[str],
    extra: type | None = None,
    complete: Callable[[Recipe], None] | None = None,
    command: str = "train",
) -> Recipe:
    """Parse `--config recipe.yaml` and overrides on the command line.

    Args:
        extra: a dataclass of further settings, those of the command that reads the recipe.
        complete: puts these into the recipe, before it is looked through for contradictions.
        command: whose `--help` lists the settings.

    Raises:
        ConfigurationError: no such file, not a mapping, unknown or contradictory keys, an unknown method, values of
            the wrong type.
    """

    def classes(given: dict[str, Any], argv: list[str]) -> tuple[Any, ...]:
        from trl import ModelConfig

        config_class = _methods()[_method(given, argv)][0]
        return (RecipeArguments, config_class, ModelConfig, *([] if extra is None else [extra]))

    argv = _split_config(argv)
    given, options = read_yaml(argv), option_names(argv)
    more = (RecipeArguments, *([] if extra is None else [extra]))
    known = known_keys(_method_named(given, argv), *more)
    if known is not None:
        refuse_unknown(given, options, known, "the recipe")
    recipe = Recipe(*parse_settings(argv, classes, what="the recipe", command=command, for_training=True))
    if "dataset_test_split" in {*given, *options} and recipe.run.eval_fraction is None:
        recipe.run.eval_dataset = recipe.run.eval_dataset or recipe.run.dataset  # TRL's is a split of the same data
    if complete is not None:
        complete(recipe)
    _refuse_contradictions(recipe)
    return recipe


def parse_settings(
    argv: Sequence[str],
    classes: Callable[[dict[str, Any], list[str]], tuple[Any, ...]],
    *,
    what: str,
    command: str = "train",
    for_training: bool = False,
) -> list[Any]:
    """Fill dataclasses from `--config FILE` and from options of the command line, which come first.

    Args:
        classes: gives them for what the file says and for the command line.
        what: the file is called in errors.
        command: whose `--help` lists the settings.
        for_training: take TRL's names of settings for ours, and settle `bf16: auto`.

    Raises:
        ConfigurationError: no such file, not a mapping, unknown keys, values of the wrong type.
    """
    argv = _split_config(argv)
    given = read_yaml(argv)
    chosen = classes(given, argv)
    known = {f.name for cls in chosen for f in fields(cls) if f.init}
    refuse_unknown(given, option_names(argv), known, what)
    if for_training:
        names = other_names(known)
        given, argv = with_our_names(given, names), options_with_our_names(argv, names)
    set_environment(given.pop("env", {}))  # before anything asks for GPUs
    if for_training:
        given, argv = settle_precision(given, argv)
    for cls in chosen:
        check_value_types(given, cls, text_is_parsed=True)
    if "--config" in argv:
        argv = [*argv[: (place := argv.index("--config"))], *argv[place + 2 :]]
    try:
        parser = make_parser(chosen, command)
        parser.set_defaults_with_config(**given)
        parsed = list(parser.parse_args_into_dataclasses(args=argv))
    except ConfigurationError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{what[0].upper()}{what[1:]} could not be read: {shown(error, 300)}") from error
    for settings in parsed:
        _check_parsed(settings)
    return parsed


# TRL's settings of the student, which checks none of them.
_MODEL_BOUNDS = {"lora_r": Bounds(least=1), "lora_alpha": Bounds(least=1), "lora_dropout": Bounds(least=0, below=1)}


def _check_parsed(settings: Any) -> None:
    """Check what does not check itself: a trainer's config does."""
    if type(settings).__module__.startswith("trl."):  # it has changed what it declares as lists
        values = {field.name: getattr(settings, field.name) for field in fields(settings) if field.init}
        check_finite(values)
        for name, bounds in _MODEL_BOUNDS.items():
            check_bounds(name, values.get(name), bounds)
    elif not hasattr(settings, "per_device_train_batch_size"):
        check_settings(settings)
        check_mappings(settings)


def _split_config(argv: Sequence[str]) -> list[str]:
    return [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]


def option_names(argv: Sequence[str]) -> list[str]:
    """Name the options of a command line; `--no_x` is an option of `x`."""
    return [a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")]


def refuse_unknown(given: Iterable[str], options: Iterable[str], known: set[str], what: str) -> None:
    """Refuse unknown keys of a file, and then those of the command line, all at once; TRL's names are known.

    Raises:
        ConfigurationError: naming them.
    """
    known = known | {theirs for theirs, ours in other_names(known).items() if ours in known}
    refuse_unknown_keys(given, known | {"env"}, what)
    asked = [option for option in options if not option.startswith("no_")]
    refuse_unknown_keys(asked, known | {"config", "help"}, "the command line")


def make_parser(classes: tuple[Any, ...], command: str = "train") -> Any:
    """Make TRL's parser; it reads every mapping as JSON, and says in one line what it cannot read."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            found = re.fullmatch(r"argument (--\w+).*: invalid (int|float) value: (.*)", message, re.DOTALL)
            if found is not None:
                kind = "whole number" if found[2] == "int" else "number"
                several = self._option_string_actions[found[1]].nargs == "+"
                expected = f"{kind}s: `{found[1]} 1 2`, or in YAML `[1, 2]`" if several else f"a {kind}"
                message = f"argument {found[1]}: got {found[3]}; expected {expected}"
            reason = shown(re.sub(r"^argument --(\w+)[^:]*", r"`\1`", message).rstrip("."), 300)
            raise ConfigurationError(f"{reason}. `distill-trainers {command} --help` lists every setting.")

    parser = Parser(classes, prog=f"distill-trainers {command}", allow_abbrev=False)
    mappings = set().union(*map(names_of_mappings, classes))
    for action in parser._actions:
        if action.dest in mappings:
            action.type = parse_mapping
    arrange(parser, classes, command)
    return parser


def _methods() -> dict[str, Any]:
    from ..trainers import METHODS

    return METHODS


def read_yaml(argv: list[str]) -> dict[str, Any]:
    if "--config" not in argv:
        return {}
    position = argv.index("--config") + 1
    if position >= len(argv):
        raise ConfigurationError("Got `--config` without a file; expected `--config recipes/….yaml`.")
    if "--config" in argv[position:]:
        raise ConfigurationError("Got `--config` twice; expected one file of settings. Leave one out.")
    path = Path(argv[position])
    if "\0" in argv[position] or not os.path.lexists(path):
        parent = path.parent if "\0" not in argv[position] and path.parent.is_dir() else None
        near = sorted(p.name for p in parent.glob("*.y*ml")) if parent else []
        ours = path.parts[:1] == ("recipes",) and not Path("recipes").exists()
        remedy = " `distill-trainers recipes` copies ours into this folder." if ours else ""
        raise ConfigurationError(
            f"There is no recipe {shown(path)!r}. Recipes in that folder: {near or 'none'}.{remedy}"
        )
    return read_settings(path, "The recipe")


def _method(recipe: dict[str, Any], argv: list[str]) -> str:
    method = _method_named(recipe, argv)
    if method not in _methods():
        raise ConfigurationError(f"Got `method: {method}`; expected one of {', '.join(_methods())}.")
    return method


def _method_named(recipe: dict[str, Any], argv: list[str]) -> str:
    method = recipe.get("method", "gkd")
    for position, argument in enumerate(argv):
        if argument == "--method" and position + 1 < len(argv):
            method = argv[position + 1]
        elif argument.startswith("--method="):
            method = argument.split("=", 1)[1]
    return str(method)


def _refuse_contradictions(recipe: Recipe) -> None:
    """What cannot work together, by name, before anything is loaded."""
    from ..teachers.loading import has_files, placement_of
    from ..teachers.placement import PLACEMENTS

    run, args, model = recipe.run, recipe.args, recipe.model
    if run.teachers is not None and run.teacher_model_name_or_path:
        raise ConfigurationError(
            "The recipe sets both `teacher_model_name_or_path` and `teachers`: one teacher, or several by name. Keep "
            "one of them."
        )
    if run.teachers is not None and run.student_init:
        raise ConfigurationError(
            "The recipe makes the student from its teacher (`student_init`), but names several `teachers`. "
            "Set `model_name_or_path`."
        )
    if run.teachers is not None and not run.teachers:
        raise ConfigurationError(
            "Got `teachers: {}`; expected some, by name (`teachers: {a: …}`). Name one at least, or leave it out and "
            "set `teacher_model_name_or_path` or `self_teacher`."
        )
    unnamed = PLACEMENTS[placement_of(run.teacher_model_name_or_path, args)].unnamed
    needs_teacher = args.needs and not run.teachers and not unnamed
    if not run.teacher_model_name_or_path and (run.student_init or needs_teacher):
        raise ConfigurationError(
            "The recipe names no teacher; set `teacher_model_name_or_path`, `teachers` or `self_teacher`."
        )
    if run.student_init and not has_files(run.teacher_model_name_or_path, args):
        raise ConfigurationError(
            "The recipe makes the student from its teacher (`student_init`), but the teacher is behind HTTP "
            "and its weights are not here. Set `model_name_or_path`."
        )
    if run.student_init and model.model_name_or_path:
        raise ConfigurationError(
            "The recipe sets both `model_name_or_path` and `student_init`: the student is either loaded or made. "
            "Keep one."
        )
    if not run.student_init and not model.model_name_or_path:
        raise ConfigurationError(
            "The recipe names no student; set `model_name_or_path`, or "
            "`student_init: {from_teacher: true, parameters: 3.0e9}`."
        )
    if not run.dataset:
        raise ConfigurationError("The recipe names no data; set `dataset` to a file, a folder or a Hub id.")
    if run.eval_dataset and run.eval_fraction is not None:
        raise ConfigurationError("The recipe sets both `eval_dataset` and `eval_fraction`. Keep one.")
    held_out = run.eval_fraction
    if held_out is not None and not (0 < held_out < 1 or (held_out >= 1 and held_out == int(held_out))):
        raise ConfigurationError(
            f"Got `eval_fraction: {held_out}`; expected a share between 0 and 1, or a number of rows from 1. Leave it "
            "out to hold out nothing."
        )
    if run.pretraining_dataset and not args.has_plain_text_loss:
        raise ConfigurationError(
            f"Got `pretraining_dataset: {shown(run.pretraining_dataset)}` with `method: {run.method}`, which has no "
            "loss on plain text. Leave it out, or take `method: minillm`."
        )
    if run.streaming and args.max_steps <= 0:
        raise ConfigurationError("`streaming: true` has no length, so set `max_steps` to a positive number.")
    has_eval = bool(run.eval_dataset or run.eval_fraction)
    if run.early_stopping_patience and (not has_eval or args.eval_strategy == "no"):
        raise ConfigurationError(
            "`early_stopping_patience` needs evaluations: set `eval_dataset` or `eval_fraction`, and `eval_strategy`."
        )
    if run.student_init:
        from ..students import StudentInit

        check_value_types(run.student_init, StudentInit)  # type: ignore[arg-type]  # parsed by now
        StudentInit.from_dict(run.student_init)  # type: ignore[arg-type]
    _check_quantization(model)


def _check_quantization(model: ModelConfig) -> None:
    name = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
    if not (model.load_in_4bit or model.load_in_8bit):
        return
    if not model.use_peft:
        raise ConfigurationError(
            f"Got `{name}: true` without `use_peft: true`: quantised weights cannot be trained, only an adapter on "
            "them. Set both, or leave quantisation out."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError(
            f"Got `{name}: true`, but bitsandbytes is not installed; `{pip_install('quantization')}`, "
            "or leave quantisation out."
        )
