"""A recipe as the doctor's case: configs, tokenizers and some rows are read, weights never."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from .. import models
from ..data.formats import apply_column_mapping, detect_dataset_type, first_row
from ..data.labels import any_trained
from ..data.pairs import is_pair
from ..data.rows import tokenize_row
from ..data.views import has_view, viewed_row
from ..exceptions import CacheError, ConfigurationError, DatasetError, NoUsableRowsError, VocabularyError
from ..recipe.checks import (
    CheckedRecipe,
    check_recipe,
    load_datasets,
    refuse_to_start_over,
    student_and_teacher,
    without_weights,
)
from ..recipe.parse import Recipe
from ..requirements import Requirements
from ..settings import require
from ..teachers.loading import has_files
from ..teachers.members import composed_of, read_members
from . import Case, Finding, Gpus, Launch
from .findings import note
from .rows import faults, marked
from .several import on_paper as several_on_paper
from .shapes import ModelShape, shape_of
from .trust import check_trust
from .work import BYTES, placement_of, workload

_SAMPLE = 200  # rows whose lengths are looked at
_MENDABLE = (ConfigurationError, DatasetError, VocabularyError, CacheError)


def case_of(
    recipe: Recipe,
    launch: Launch,
    gpus: Gpus | None = None,
    architectures: str | None = None,
    checked: CheckedRecipe | None = None,
) -> tuple[Case, list[Finding]]:
    """Return the case, and what could not even be read.

    Args:
        architectures: folder of config.json files named after models (`owner--name.json`), for models that are not at
            hand: those are judged on paper, by their sizes alone.
        checked: what a run has read of the recipe already.
    """
    student, teacher = student_and_teacher(recipe)
    findings: list[Finding] = []
    several: Any = None
    taught_by = _taught_by(teacher, recipe)
    if isinstance(teacher, Mapping) or recipe.args.extrapolate:
        findings.append(
            note(
                "teacher",
                f"There are several teachers ({taught_by}): their tokenizers and caches are looked at by the run's own "
                "checks alone.",
                "Look at each with a recipe of its own, which names it alone.",
            )
        )
        several, teacher = teacher, None
    on_paper = {name for name in (student, teacher) if name and _paper(name, architectures) is not None}
    if checked is None:
        _attempt(findings, "recipe", lambda: refuse_to_start_over(recipe.args))
    if checked is None and not on_paper:
        checked = _attempt(findings, "recipe", lambda: check_recipe(recipe), ignored=VocabularyError)
    case = Case(recipe.args, launch, student, teacher, taught_by=taught_by, gpus=gpus, peft=recipe.model.use_peft)
    if checked is not None:
        case.student_config, case.tokenizer = checked.student_config, checked.ready.pair.tokenizer
        if teacher is not None:
            case.teacher_config, case.teacher_tokenizer = checked.teacher_config, checked.ready.pair.teacher_tokenizer
        train, wants = checked.ready.given.train, checked.ready.wants
    else:
        train = _read_apart(recipe, case, architectures, on_paper, findings)
        reads = train is not None and recipe.args.reads_first_row
        row = _attempt(findings, "recipe", lambda: first_row(train)) if reads else None
        wants = recipe.args.requirements(row)
    case.samples = wants.samples_completions
    if train is not None and case.tokenizer is not None:
        _look_at_rows(recipe, case, wants, train, findings)
    _sizes(recipe, case, findings)
    if several is not None:
        _several(recipe, case, several, findings, architectures, on_paper)
    findings += check_trust(recipe)
    if on_paper:
        findings.append(
            note(
                "recipe",
                f"Judged on paper, by their sizes: {', '.join(sorted(on_paper))}. Tokenizers, templates and data were "
                "not looked at.",
                "Run the doctor without `--architectures` where the models can be read.",
            )
        )
    return case, findings


def _taught_by(teacher: Any, recipe: Recipe) -> str:
    """Name the teacher in words: several by their names, the student as its own by which state of it."""
    moved: Any = recipe.args.extrapolate
    if isinstance(teacher, Mapping):
        return ", ".join(teacher)
    if recipe.args.self_teacher:
        return f"itself ({recipe.args.self_teacher})"
    return f"{teacher}, away from {moved['reference']}" if teacher and moved else str(teacher or "no teacher")


def _attempt(
    findings: list[Finding], concern: str, call: Callable[[], Any], ignored: type[Exception] | tuple[()] = ()
) -> Any:
    """What `call` returns, or None and a finding; errors of the kind `ignored` are another check's to tell."""
    try:
        return call()
    except ignored:
        return None
    except _MENDABLE as error:
        findings.append(Finding.of_error(concern, error))
        return None


def _paper(name: str, architectures: str | None) -> dict[str, Any] | None:
    """The config of a model that is only on paper."""
    if architectures is None:
        return None
    folder = Path(architectures)
    require(os.path.isdir(folder), "architectures", architectures, "a folder of `owner--name.json` files")
    file = folder / f"{name.replace('/', '--')}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"The config {str(file)!r} cannot be read: {error}. Fetch it anew.") from error


def _config(name: str, role: str, options: Any, architectures: str | None) -> Any:
    """The config of a model: on paper, or else from where its files are."""
    from transformers import AutoConfig

    paper = _paper(name, architectures)
    return models.load_config(name, role, **options.files_of(role)) if paper is None else AutoConfig.for_model(**paper)


def _read_apart(
    recipe: Recipe, case: Case, architectures: str | None, on_paper: set[str], findings: list[Finding]
) -> Any:
    """Everything that can be read although something else cannot; returns the training data."""
    from ..recipe.checks import made_config
    from ..teachers.loading import teacher_tokenizer
    from ..trainers.student import student_tokenizer

    args = recipe.args

    def config(name: str, role: str) -> Any:
        return _config(name, role, args, architectures)

    case.student_config = _attempt(findings, "recipe", lambda: made_config(config(case.student, "student"), recipe)[0])
    if has_files(case.teacher, args):
        case.teacher_config = _attempt(findings, "recipe", lambda: config(str(case.teacher), "teacher"))
    if on_paper:
        return None
    case.tokenizer = _attempt(findings, "recipe", lambda: student_tokenizer(case.student, args))
    if case.tokenizer is not None and case.teacher is not None:
        tokenizer = case.tokenizer
        case.teacher_tokenizer = _attempt(findings, "recipe", lambda: teacher_tokenizer(case.teacher, tokenizer, args))
    read = _attempt(findings, "recipe", lambda: load_datasets(recipe))
    return None if read is None else read[0]


def _look_at_rows(recipe: Recipe, case: Case, wants: Requirements, train: Any, findings: list[Finding]) -> None:
    """The first rows, whole and as they are trained on; what a run would refuse of them is a finding."""
    from ..recipe.checks import optimiser_steps
    from ..trainers.given.token_batches import check_longest, row_tokens
    from ..trainers.preflight import prepare_rows

    assert case.tokenizer is not None
    case.num_rows = len(train) if hasattr(train, "__len__") else None
    case.steps = optimiser_steps(recipe.args, case.num_rows, case.launch.processes)
    try:
        first_rows = train.take(_SAMPLE)
        mapping: Any = recipe.args.column_mapping
        renamed = apply_column_mapping(first_rows, mapping, name="train")
        rows = list(islice(iter(renamed), _SAMPLE))
        case.sample, case.features = rows, getattr(renamed, "features", None)
        case.prepared = prepare_rows(recipe.args, first_rows, case.tokenizer, "train", wants)
        if recipe.args.per_device_train_tokens is not None and case.num_rows is not None:
            answers = recipe.args.answers_prompts("train", wants)
            tokens = row_tokens(case.prepared, recipe.args, sampled=answers)
            known = len(tokens) == case.num_rows and not wants.replaces_completions
            case.steps_are_estimated = recipe.args.max_steps <= 0 and not known
            case.steps = optimiser_steps(recipe.args, case.num_rows, case.launch.processes, tokens)
            check_longest(case.prepared, recipe.args, sampled=answers)
    except _MENDABLE as error:
        more = case.num_rows is None or case.num_rows > _SAMPLE  # rows that were not looked at may be good
        refusal = Finding.of_error("recipe", error)
        known = refusal.what in {finding.what for finding in findings}  # the recipe's own check may have told it
        if not known and not (more and isinstance(error, NoUsableRowsError)):
            findings.append(refusal)
        with contextlib.suppress(*_MENDABLE, KeyError):  # rows of a layout that the method does not read
            others = faults(case.sample, case.tokenizer, recipe.args, case.features)
            findings += [Finding.of_error("recipe", other) for other in others if str(other) != str(error)]
        return
    trained = next((row for row in case.prepared if any_trained(row.get("labels", ()))), None)
    case.first_row = [] if trained is None else marked(trained, case.tokenizer)
    if trained is not None and has_view(trained):
        case.teacher_row = marked(viewed_row(trained), wants.teacher_tokenizer or case.tokenizer)
    with contextlib.suppress(*_MENDABLE, KeyError):
        kind = "preference" if is_pair(rows[0]) else detect_dataset_type(rows[0])
        whole = [row for row in case.prepared if "input_ids" in row]
        if kind not in ("preference", "rationale"):
            settings: Any = {
                name: getattr(recipe.args, name) for name in ("assistant_only_loss", "chat_template_kwargs")
            }
            settings["features"] = case.features
            whole = [tokenize_row(row, case.tokenizer, dataset_type=kind, **settings) for row in rows]
        case.lengths = [len(row["input_ids"]) for row in whole]
        case.prompt_lengths = [row["prompt_length"] for row in whole]


def _sizes(recipe: Recipe, case: Case, findings: list[Finding]) -> None:
    """Shapes, dtypes, workload and the teacher's placement."""
    args, model = recipe.args, recipe.model
    kwargs: dict[str, Any] = args.model_init_kwargs or {}  # type: ignore[assignment]
    case.student_dtype = _dtype(kwargs.get("dtype", model.dtype), case.student_config, "float32")
    teacher_kwargs: dict[str, Any] = args.teacher_model_init_kwargs or {}  # type: ignore[assignment]
    if args.self_teacher == "initial" and not case.peft:  # a copy of the student
        case.teacher_config, teacher_kwargs = case.student_config, {"dtype": case.student_dtype, **teacher_kwargs}
    case.teacher_dtype = _dtype(teacher_kwargs.get("dtype", "auto"), case.teacher_config, "float32")
    case.student_shape = _shape(recipe, case.student_config, findings, adapted=True)
    case.teacher_shape = _shape(recipe, case.teacher_config, findings, adapted=False)
    frozen = {True: 0.52, False: 1.0}[model.load_in_4bit] if model.load_in_4bit or model.load_in_8bit else None
    case.work = workload(
        args,
        recipe.run.method,
        case.launch,
        student_dtype=case.student_dtype,
        frozen_bytes=frozen,
        teacher_dtype=case.teacher_dtype,
        samples=case.samples,
        longest=max(case.lengths, default=1024),
        teacher_more=_teacher_more(case),
    )
    if case.student_config is not None:
        case.stops = _stop_ids(case.student, case.student_config)
    complete = False
    if args.teacher_cache is not None and case.tokenizer is not None and case.teacher is not None:
        complete = _cache(case)
    cached = complete and not case.samples
    case.placement = placement_of(args, case.teacher, case.launch, cached=cached, adapted=case.peft)


def _teacher_more(case: Case) -> int:
    """Count the tokens that the rows looked at have for the teacher beyond the student's, at the most."""
    columns = getattr(case.prepared, "column_names", None) or []
    if not {"teacher_length", "length", "prompt_length"} <= set(columns):
        return 0
    new = case.args.max_new_tokens if case.samples else 0
    rows = zip(*(case.prepared[name] for name in ("teacher_length", "length", "prompt_length")), strict=True)
    return max((theirs - max(length, prompt + new) for theirs, length, prompt in rows), default=0)


def _several(
    recipe: Recipe, case: Case, given: Any, findings: list[Finding], architectures: str | None, on_paper: set[str]
) -> None:
    """Set what is known of several teachers without their weights; adds those of `architectures` to `on_paper`."""
    args = recipe.args

    def read(name: str, options: Any) -> tuple[ModelShape | None, str]:
        if not has_files(name, options):
            return None, "float32"
        config = _attempt(findings, "recipe", lambda: _config(name, "teacher", options, architectures))
        if config is not None and _paper(name, architectures) is not None:
            on_paper.add(name)
        kwargs = options.teacher_model_init_kwargs or {}
        return _shape(recipe, config, findings, adapted=False), _dtype(kwargs.get("dtype", "auto"), config, "float32")

    with contextlib.suppress(*_MENDABLE):  # the recipe's own check has told
        members = read_members(given, args)
        student = recipe.model.model_name_or_path or case.student
        case.teachers = several_on_paper(members, args, case.launch, student, read, adapted=case.peft)
        case.composed = len(composed_of(args, members)) == 1


def _cache(case: Case) -> bool:
    """Sets what the cache is still going to take, from a sample of the rows; returns whether it holds them."""
    from ..teachers.base import Pair
    from ..teachers.cache.opening import missing_from_cache
    from ..teachers.rows import dataset_rows

    pair = Pair(case.student, case.teacher, tokenizer=case.tokenizer, teacher_tokenizer=case.teacher_tokenizer)
    try:
        rows = () if case.prepared is None else dataset_rows(case.prepared)
        missing, _, size = missing_from_cache(pair, case.args, rows)
    except _MENDABLE:
        return False  # the teacher's check tells
    looked_at = len(case.prepared) if case.prepared is not None else 0
    case.cache_bytes = size * (case.num_rows or looked_at) / max(1, looked_at)
    return bool(looked_at) and not missing


def _shape(recipe: Recipe, config: Any, findings: list[Finding], *, adapted: bool) -> ModelShape | None:
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None
    built = _attempt(findings, "recipe", lambda: without_weights(config, recipe, adapted=adapted))
    return None if built is None else shape_of(built)


def _stop_ids(name: str, config: Any) -> list[int]:
    """Tokens that end a completion by the model's generation config, or else by its config."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(name).eos_token_id
    except (OSError, ValueError):
        ids = getattr(config.get_text_config(), "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _dtype(dtype: Any, config: Any, default: str) -> str:
    if dtype in (None, "auto"):
        dtype = getattr(config, "dtype", None) or default
    name = str(dtype).removeprefix("torch.")
    return name if name in BYTES else default
