"""Several teachers as a user gives them: names, what each is with settings of its own, and how they are made one.

Nothing is loaded here.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from .. import models
from ..exceptions import CacheError, ConfigurationError, VocabularyError, refuse_unknown_keys
from ..settings import shown
from ..value_types import check_bounds, check_value_types
from .base import Teacher
from .composed import check_weights, equal_weights
from .options import TeacherOptions
from .placement import PLACEMENTS
from .several import check_name

INITIAL = "initial"  # the student before training, as a reference
# Settings of all teachers together: rows are written once, before anybody asks whose they are.
_VIEW = frozenset({"teacher_system_prompt", "teacher_prompt", "teacher_max_length", "teacher_too_long"})
_ALL = frozenset({"teacher_column", "teacher_mix", "teacher_weights", "teacher_tokenizer"}) | _VIEW
_COMPOSING = ("teacher_mix", "teacher_weights", "extrapolate", "weak_to_strong")
_SOURCES = ("teacher_model_name_or_path", "teacher_model")


@dataclass(frozen=True)
class Member:
    """One of several teachers.

    Attributes:
        given: a name, a model or a `Teacher`; None with a placement that names none.
        options: those of the run, with the member's own in their place.
        adapter: folder or Hub id of a PEFT adapter on the model `given`.
        is_initial: it is the student before training.
    """

    given: Any
    options: TeacherOptions
    adapter: str | None = None
    is_initial: bool = False


class Members(dict[str, Member]):
    """Teachers by name, in the order of the user's."""


def read_members(teacher: Any, options: TeacherOptions) -> Any:
    """Return `Members` of a mapping, or of one teacher that is moved away from a reference; all else as it is.

    Raises:
        ConfigurationError: names or settings that cannot be; weights and parts that name no teacher.
    """
    if isinstance(teacher, Members):
        return teacher
    several = isinstance(teacher, Mapping)
    nobody = teacher is None and not PLACEMENTS[options.teacher_placement].unnamed
    if not several and (nobody or not options.composes_teachers):
        return teacher
    if getattr(teacher, "names", ()):
        raise ConfigurationError(
            f"Got a {type(teacher).__name__} of {', '.join(teacher.names)} with settings that compose teachers; "
            "expected them by name (`teacher_model={'a': …, 'b': …}`), or composed already: a RoutedTeacher of "
            "ComposedTeachers."
        )
    if several and not teacher:
        raise ConfigurationError(
            "Got no teachers in the mapping of them (`teachers: {}`); expected some, by name (`teachers: {a: …}`). "
            "Name one at least, or leave it out and set `teacher_model_name_or_path` or `self_teacher`."
        )
    if options.teacher_cache is not None:
        what = "several teachers" if several else "settings that make one teacher of several"
        raise ConfigurationError(
            f"Got `teacher_cache: {options.teacher_cache}` with {what}; expected a folder for each of them, "
            "since a cache holds the answers of one: `teachers: {NAME: {teacher_model_name_or_path: …, teacher_cache: "
            "…}}`."
        )
    if not several and not options.extrapolate:
        needed = "teacher_mix" if options.teacher_mix else "weak_to_strong"
        raise ConfigurationError(
            f"Got `{needed}` with one teacher; expected several by name (`teachers: {{a: …, b: …}}` in a recipe, "
            "`teacher_model={'a': …, 'b': …}` in Python). Name them, or leave it out."
        )
    entries = dict(teacher) if several else {"teacher": teacher}
    members = Members()
    for name, entry in entries.items():
        check_name(name)
        if name == INITIAL:
            raise ConfigurationError(
                f"Got a teacher by the name {INITIAL!r}, which means the student before training. Give it another name."
            )
        with naming(name):
            members[name] = _member(entry, options)
            _check_given(members[name].given)
    parts = _parts(options, list(members))
    used = {part for weights in parts.values() for part in weights}
    if INITIAL in used:
        members[INITIAL] = Member(None, own_options(options, {}), is_initial=True)
    return members


def names_of(teacher: Any, options: TeacherOptions) -> tuple[str, ...]:
    """Name the teachers that a row may belong to; none where there is one for all rows."""
    if not isinstance(teacher, Members):
        return getattr(teacher, "names", ())
    names = list(composed_of(options, teacher) if options.composes_teachers else teacher)
    return tuple(names) if len(names) > 1 or not options.composes_teachers else ()


def composed_of(options: TeacherOptions, members: Members) -> dict[str, dict[str, float]]:
    """Return what each teacher is composed of: weights of members, none of them 0, by the composed one's name."""
    parts = _parts(options, [name for name, member in members.items() if not member.is_initial])
    return {name: {part: weight for part, weight in weights.items() if weight} for name, weights in parts.items()}


def _parts(options: TeacherOptions, names: list[str]) -> dict[str, dict[str, float]]:
    if options.teacher_mix is not None:
        weights: Any = equal_weights(names) if options.teacher_weights is None else options.teacher_weights
        check_weights(weights, names, "teacher_weights")
        return {"mix": weights}
    given: Any = options.weak_to_strong
    if given is not None:
        parts = [given["base"], given["plus"], given["minus"]]
        _refuse_unknown("weak_to_strong", given, parts, names)
        if idle := sorted(set(names) - set(parts)):
            raise ConfigurationError(
                f"Got `weak_to_strong: {given}`, in which {', '.join(idle)} have no part. Leave those teachers out."
            )
        weights = dict.fromkeys(parts, 0.0)
        for part, weight in zip(parts, (1.0, given["alpha"], -given["alpha"]), strict=True):
            weights[part] += weight  # one may stand in two places
        return {"weak_to_strong": weights}
    given = options.extrapolate
    if given is not None:
        reference, scale = given["reference"], given["scale"]
        _refuse_unknown("extrapolate", given, [reference], names)
        moved = [name for name in names if name != reference]
        if not moved:
            raise ConfigurationError(
                f"Got `extrapolate: {given}` with the reference alone; expected a teacher to move away from it."
            )
        return {name: {reference: 1 - scale, name: scale} for name in moved}
    return {}


def _refuse_unknown(setting: str, given: Mapping[str, Any], parts: list[str], names: list[str]) -> None:
    for part in parts:
        if part not in (*names, INITIAL):
            raise ConfigurationError(
                f"Got `{setting}: {dict(given)}`, where {part!r} is no teacher; expected {INITIAL!r} (the student "
                f"before training), or one of {', '.join(names)}."
            )


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Say, within it, whose settings are wrong."""
    try:
        yield
    except (ConfigurationError, VocabularyError, CacheError) as error:
        told = str(error)
        raise type(error)(told if told.startswith("The teacher '") else f"The teacher {name!r}: {told}") from error


def _check_given(given: Any) -> None:
    """Refuse what is neither one teacher nor the name of one."""
    if given is not None and not isinstance(given, str | nn.Module | Teacher):
        raise ConfigurationError(
            f"Got {given!r:.80} ({type(given).__name__}); expected a folder, a Hub id or an address, a mapping such as "
            "`{teacher_model_name_or_path: …}`, or in Python a model or a Teacher. Put text in quotes."
        )
    if isinstance(given, Teacher) and given.names:
        raise ConfigurationError(
            f"Got a {type(given).__name__} of {', '.join(given.names)} as one of several teachers; expected one for "
            "all rows of that name. Name its teachers beside the others, or pass it alone as `teacher_model`."
        )


def _member(entry: Any, options: TeacherOptions) -> Member:
    if isinstance(entry, Member):
        return entry
    settings: dict[str, Any] = dict(entry) if isinstance(entry, Mapping) else {_SOURCES[0]: entry}
    own = {f.name: f for f in fields(TeacherOptions) if f.name.startswith("teacher_") and f.name not in _ALL}
    if common := sorted(settings.keys() & _ALL):
        raise ConfigurationError(
            f"Got `{common[0]}: {shown(settings[common[0]])}` with one of several teachers; expected it beside "
            "`teachers`, for all of them. Set it there; where their prompts differ, let a column of the data say how "
            "(`teacher_prompt: COLUMN`)."
        )
    refuse_unknown_keys(settings, {*own, *_SOURCES}, "one of several teachers")
    given = [settings.pop(name) for name in _SOURCES if name in settings]
    if len(given) > 1:
        raise ConfigurationError(f"Got both `{_SOURCES[0]}` and `{_SOURCES[1]}`, which mean the same. Keep one.")
    check_value_types(settings, TeacherOptions, text_is_parsed=False)
    for name, value in settings.items():
        check_bounds(name, value, own[name].metadata.get("bounds"))
    source, adapter = (given or [None])[0], None
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    if isinstance(source, str) and settings.get("teacher_adapter"):  # beside a base of its own, not on the student's
        adapter = settings.pop("teacher_adapter")
    elif isinstance(source, str) and _is_adapter(source):
        source, adapter = _base_of(source), source
    member = Member(source, own_options(options, settings), adapter)
    if adapter is not None:
        _check_adapter(member)
    return member


def own_options(options: TeacherOptions, settings: Mapping[str, Any]) -> TeacherOptions:
    """Return the run's options with a member's own in their place, checked; the run's are not touched.

    Not by `dataclasses.replace`: the options are a part of `TrainingArguments`, which would set up devices anew.
    """
    own = copy.copy(options)
    kwargs = settings.get("teacher_model_init_kwargs", options.teacher_model_init_kwargs)
    changes = {**dict.fromkeys(_COMPOSING), "teacher_column": "teacher", **settings}
    changes["teacher_model_init_kwargs"] = models.settled_kwargs(kwargs, "teacher_model_init_kwargs") or None
    for name, value in changes.items():
        object.__setattr__(own, name, value)
    own.check_teacher_options()
    return own


def _is_adapter(source: str) -> bool:
    folder = Path(os.path.expanduser(source))
    return os.path.isfile(folder / "adapter_config.json") and not (folder / "config.json").is_file()


def _base_of(folder: str) -> str:
    try:
        told = json.loads((Path(os.path.expanduser(folder)) / "adapter_config.json").read_text(encoding="utf-8"))
        base = told["base_model_name_or_path"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"The adapter in {folder!r} names no base model: its `adapter_config.json` is damaged. Fetch it again."
        ) from error
    if not isinstance(base, str) or not base:
        raise ConfigurationError(
            f"The adapter in {folder!r} names the base model {base!r}; expected a folder or Hub id. Write "
            "`{teacher_model_name_or_path: BASE, teacher_adapter: FOLDER}`."
        )
    return base


def _check_adapter(member: Member) -> None:
    """Refuse what a base that adapters share cannot do."""
    placement = member.options.teacher_placement
    if placement not in ("auto", "replicate", "device_map", "quantized-8bit", "quantized-4bit"):
        raise ConfigurationError(
            f"Got `teacher_placement: {placement}` with the adapter {member.adapter!r}; expected `replicate`: a base "
            "that adapters share is whole on each process. Or merge the adapter into a model of its own."
        )
    if member.options.teacher_cache is not None:
        raise ConfigurationError(
            f"Got `teacher_cache` with the adapter {member.adapter!r}, of which a cache cannot tell that it is the "
            "same one. Leave the cache out, or merge the adapter into a model of its own."
        )
    adapter = str(member.adapter)
    file = Path(os.path.expanduser(adapter)) / "adapter_config.json"
    if models.looks_like_path(adapter) and not os.path.isfile(file):
        raise ConfigurationError(
            f"Got `teacher_adapter: {adapter}`, where there is no `adapter_config.json`; expected the folder or Hub id "
            "of a PEFT adapter."
        )
