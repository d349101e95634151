"""What evaluation has to know of a run to take up its teacher, its baseline, its held-out rows and its settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.teacher_prompts import renamed
from ..exceptions import ConfigurationError, DatasetError
from ..recipe.checks import datasets_of
from ..recipe.parse import Recipe, RecipeArguments
from ..redaction import hidden, holds_secret
from ..run_files import STUDENT_INIT_NAME
from ..storage import write_file
from ..teachers.loading import has_files, is_initial_student, placement_of
from ..teachers.options import OWN, SHARED
from ..teachers.placement import PLACEMENTS

if TYPE_CHECKING:
    from ..evaluation import EvaluationSettings

NAME = "evaluate.json"  # it names paths of this machine, and is never uploaded
_VERSION = 2
_DATA = (
    *("dataset", "dataset_config", "dataset_split", "eval_dataset", "eval_split", "eval_fraction"),
    *("max_train_samples", "streaming"),
)
_SETTINGS = (
    *("max_new_tokens", "stop_strings", "answer_formats", "answer_kind", "chat_template_kwargs"),
    *("teacher_system_prompt", "teacher_prompt", "teacher_tokenizer"),
)


def remember(recipe: Recipe, tokenizer: Any, evaluation: Any) -> None:
    """Write into the run's folder what `distill-trainers evaluate --run` reads.

    Args:
        evaluation: the raw rows that are held out; None where there are none.
    """
    run, args, teacher = recipe.run, recipe.args, recipe.run.teacher_model_name_or_path
    settings = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name, None) is not None}
    left_out = sorted(name for name, value in settings.items() if holds_secret(value, name))
    settings = {name: value for name, value in settings.items() if name not in left_out}
    if settings.pop("teacher_tokenizer", SHARED) != SHARED:
        settings["teacher_tokenizer"] = OWN  # the one beside the teacher
    if "teacher_prompt" in settings:  # evaluation reads rows whose columns are renamed already
        mapping: Any = args.column_mapping or {}
        settings["teacher_prompt"] = renamed(settings["teacher_prompt"], mapping)
    data = {name: getattr(run, name) for name in _DATA}
    for name in ("dataset", "eval_dataset"):
        data[name] = _whole_path(data[name])
    told = {
        "version": _VERSION,
        "teacher": _whole_path(teacher) if has_files(teacher, args) else None,  # several are compared one by one
        "teacher_is_a_server": teacher is not None and not has_files(teacher, args),
        "several_teachers": sorted(run.teachers or {}),
        "teacher_is_baseline": is_initial_student(teacher, args),
        "teacher_note": _teacher_note(recipe),
        "baseline": _whole_path(recipe.model.model_name_or_path),  # none: it lies in the run's folder
        "trust_remote_code": args.trust_remote_code,
        "init_kwargs": _init_kwargs(recipe),
        "data": data,
        "seed": args.seed,
        "column_mapping": args.column_mapping,
        "rows": None if evaluation is None or run.streaming else _digest(evaluation),
        "settings": {**settings, "max_length": args.row_limit, **_question_prompt(args, tokenizer)},
        "left_out": left_out,
    }
    text = json.dumps(hidden(told), indent=1, default=str)
    write_file(
        Path(args.output_dir) / NAME, text, "what evaluation needs", "Free some space and start again.", private=True
    )


def recall(folder: str) -> dict[str, Any]:
    """Read what `remember` wrote.

    Raises:
        ConfigurationError: there is no finished run in `folder`.
    """
    path, expected = Path(os.path.expanduser(folder)), "expected the `output_dir` of a run of `distill-trainers train`"
    if not os.path.isdir(path):
        raise ConfigurationError(f"Got `run: {folder}`, which is not a folder; {expected}.")
    try:
        told = json.loads((path / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"Got `run: {folder}`, in which there is no {NAME} that can be read ({error}); {expected}. Of another "
            "folder, name `student`, `teacher`, `baseline` and `dataset`."
        ) from error
    if not isinstance(told, dict) or told.get("version") != _VERSION:
        raise ConfigurationError(
            f"Got `run: {folder}`, whose {NAME} is of another version of distill_trainers; {expected} of this one. "
            "Name `student`, `teacher`, `baseline` and `dataset` instead."
        )
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        begun = sorted(checkpoint.name for checkpoint in path.glob("checkpoint-*"))
        more = f" Its checkpoints are {begun}: one of them can be the `student`, with `teacher` and `dataset`."
        raise ConfigurationError(
            f"Got `run: {folder}`, which holds no finished student (config.json or adapter_config.json); {expected} "
            f"that has ended.{more if begun else ''}"
        )
    return told


def take_up(args: Any, settings: EvaluationSettings) -> list[str]:
    """Fill in models and settings of `args.run` where nothing was given, and return what is to be told about it.

    Args:
        args: the command's `EvaluateArguments`; what they have as `given` stays as it is.

    Raises:
        ConfigurationError: there is no such run, or students are named beside it.
    """
    told, folder = recall(args.run), Path(os.path.expanduser(args.run))
    if args.student or args.students:
        raise ConfigurationError("The settings name `run`, and a student besides. Keep one of them.")
    args.students = {folder.resolve().name: str(folder)}
    baseline = told["baseline"] or str(folder / STUDENT_INIT_NAME)
    teacher = baseline if told.get("teacher_is_baseline") else told["teacher"]
    values = {"teacher": teacher, "baseline": baseline, "output_dir": str(folder / "evaluation")}
    notes = []
    for model, kwargs in told["init_kwargs"].items():
        name, private = f"{model}_model_init_kwargs", kwargs["private"]
        if {model, name} & args.given:  # of another model, or set
            continue
        values[name] = kwargs["kept"] or None
        if private:
            notes.append(f"The run's {model} was loaded with {private}, which no file keeps. Set `{name}` if needed.")
    if left_out := sorted(set(told.get("left_out", ())) - args.given):
        notes.append(f"What looks like a secret stood in {left_out}, which no file keeps. Set it if needed.")
    if "teacher" not in args.given and told["teacher_is_a_server"]:
        notes.append("The run's teacher is a server, which evaluation does not ask; name a model as `teacher` for it.")
    if "teacher" not in args.given and told.get("several_teachers"):
        notes.append("The run has several teachers, of which none was taken; name one as `teacher` to compare with it.")
    if "teacher" not in args.given and told.get("teacher_note"):
        notes.append(told["teacher_note"])
    for name, value in {**values, "trust_remote_code": told["trust_remote_code"]}.items():
        if name not in args.given:
            setattr(args, name, value)
    for name, value in told["settings"].items():
        if name not in args.given:
            setattr(settings, name, value)
    return notes


def held_out_rows(folder: str) -> Any:
    """Load the rows that a run held out, as it had them: those of its `eval_dataset`, or of its `eval_fraction`.

    Raises:
        ConfigurationError: it held none out.
        DatasetError: they are no longer the same.
    """
    from ..data import apply_column_mapping

    told = recall(folder)
    data = RecipeArguments(**told["data"])
    if not (data.eval_dataset or data.eval_fraction):
        raise ConfigurationError(
            f"Got `run: {folder}`, which held out no rows (neither `eval_dataset` nor `eval_fraction`); expected one "
            "that did. Name a `dataset` to evaluate it on."
        )
    rows = datasets_of(data, told["seed"])[1]
    if told["rows"] is not None and _digest(rows) != told["rows"]:
        raise DatasetError(
            f"The rows that the run {folder!r} held out are no longer those that its data gives: "
            f"{data.eval_dataset or data.dataset!r} has changed, so rows that it was trained on may be among them. Put "
            "the data back as it was, or name a `dataset`."
        )
    return _without_rejected(apply_column_mapping(rows, told["column_mapping"], name="eval"))


def _without_rejected(rows: Any) -> Any:
    """Rows of pairs as prompts with their chosen completion."""
    from ..data.formats import first_row
    from ..data.pairs import is_pair, split_pair

    first = first_row(rows, name="eval")
    if not is_pair(first):
        return rows
    # The rest, such as `tools` and `system`, belongs to the prompt.
    read = [name for name in ("chosen", "rejected", "prompt", "messages", "conversations") if name in first]
    return rows.map(lambda row: dict(zip(("prompt", "completion"), split_pair(row), strict=False)), remove_columns=read)


def _question_prompt(args: Any, tokenizer: Any) -> dict[str, str]:
    """What asks the questions of method rationale: the answer alone, or the whole chain, as it was trained."""
    from ..data.rationales import RationaleTemplates

    if not hasattr(args, "chain_prompt"):
        return {}
    asked = {name: getattr(args, name) for name in ("label_prompt", "chain_prompt")}
    templates = RationaleTemplates.of(args.prompt_style, tokenizer, **asked)
    return {"question_prompt": templates.label_prompt if args.objective == "step_by_step" else templates.chain_prompt}


def _init_kwargs(recipe: Recipe) -> dict[str, Any]:
    """How teacher and baseline are loaded, by model: what is kept of it, and the names of what may be secret."""
    from ..models import which_files

    args: Any = recipe.args
    # A student's other arguments say how it is trained; the baseline only has to be the same files.
    files = which_files(args.model_init_kwargs) if recipe.model.model_name_or_path else {}
    files = {name: value for name, value in files.items() if name != "trust_remote_code" and value != "main"}
    theirs = args.teacher_model_init_kwargs or {}
    if is_initial_student(recipe.run.teacher_model_name_or_path, args):
        theirs = {**files, **theirs}
    given = {"teacher": theirs, "baseline": files}
    told = {}
    for model, kwargs in given.items():
        private = sorted(name for name, value in kwargs.items() if holds_secret(value, name))
        told[model] = {"kept": {n: value for n, value in kwargs.items() if n not in private}, "private": private}
    return told


def _teacher_note(recipe: Recipe) -> str | None:
    """What is to be told of a teacher that no model evaluation can load is; None where one is, or others tell it."""
    args: Any = recipe.args
    teacher, several = recipe.run.teacher_model_name_or_path, bool(recipe.run.teachers)
    if args.extrapolate and not several:
        return "The run's teacher was composed (`extrapolate`); what is compared here is the plain one that it named."
    if several or teacher is not None or is_initial_student(teacher, args):
        return None
    place = placement_of(teacher, args)
    if not PLACEMENTS[place].unnamed:  # there was none
        return None
    what = f"the adapter {args.teacher_adapter}" if args.teacher_adapter else PLACEMENTS[place].summary
    return (
        f"The run's teacher ({place}: {what}) is no model to be loaded here; name one as `teacher` to compare with it."
    )


def _whole_path(name: str | None) -> str | None:
    """A Hub id or address as it is, a path of this machine from its root."""
    path = None if name is None else Path(os.path.expanduser(name))
    return str(path.resolve()) if path is not None and os.path.exists(path) else name


def _digest(rows: Iterable[Any]) -> dict[str, Any]:
    """How many rows there are, and what identifies them."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "replace"))
        count += 1
    return {"count": count, "sha256": digest.hexdigest()}
