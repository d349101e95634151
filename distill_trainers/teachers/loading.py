"""From what a user gave as the teacher to a `Teacher`: its kind, what is refused, how it is opened and loaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import models
from ..exceptions import ConfigurationError
from ..requirements import Requirements
from .base import NoTeacher, Pair, Teacher, is_remote
from .cache.opening import source_of
from .cache.teacher import CachedTeacher
from .local import LocalTeacher
from .options import TeacherOptions
from .remote.teacher import RemoteTeacher
from .self_teacher import AdapterOff, AveragedStudent, InitialStudent, LiveStudent
from .vocabulary import shared_vocabulary

logger = logging.getLogger(__name__)

# Placements that are a kind of their own; all others are places of a `LocalTeacher`.
KINDS: dict[str, type[Teacher]] = {
    "adapter_off": AdapterOff,
    "initial": InitialStudent,
    "ema": AveragedStudent,
    "live": LiveStudent,
    "cached": CachedTeacher,
    "remote": RemoteTeacher,
}


def placement_of(teacher: Any, options: TeacherOptions) -> str:
    """Return `self_teacher` or `teacher_placement`, or `remote` where a teacher is named by its address."""
    return options.self_teacher or ("remote" if is_remote(teacher) else options.teacher_placement)


def kind_of(teacher: Any, options: TeacherOptions) -> type[Teacher]:
    """Return the class that a teacher, as it was given, is going to be of."""
    kind = KINDS.get(placement_of(teacher, options))
    if kind is not None:
        return kind
    if isinstance(teacher, Teacher):
        return type(teacher)
    return NoTeacher if teacher is None else LocalTeacher


def has_files(teacher: Any, options: TeacherOptions) -> bool:
    """Tell whether the configuration and tokenizer of a teacher, as it was given, can be read before it is loaded."""
    return teacher is not None and kind_of(teacher, options).has_files


def refuse(pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
    """Refuse a teacher that cannot serve, from settings alone: nothing is loaded, no server is asked.

    Raises:
        ConfigurationError: naming what was got, what was expected and what to do.
    """
    teacher, placement = pair.teacher, options.teacher_placement
    if is_remote(teacher) and placement not in ("auto", "remote"):
        raise ConfigurationError(
            f"Got `teacher_placement: {placement}` with the teacher {teacher!r}, which runs elsewhere. Set `remote`, "
            "or name the teacher by folder or Hub id."
        )
    kind = kind_of(teacher, options)
    placed = isinstance(teacher, Teacher) and not (placement in KINDS and isinstance(teacher, KINDS[placement]))
    free = ("auto", "adapter_off", "remote")
    if placed and placement not in free and getattr(teacher, "placement", None) not in ("auto", placement):
        raise ConfigurationError(
            f"Got `teacher_placement: {placement}` with a {type(teacher).__name__}, which is placed already. Leave "
            "`teacher_placement` out, or pass a model or its name."
        )
    kind.refuse(pair, options, wants)
    if options.teacher_cache is not None and not issubclass(kind, CachedTeacher):
        CachedTeacher.refuse(pair, options, wants)
    for other in KINDS.values():
        if not issubclass(kind, other):
            other.refuse_idle(options)


def open_teacher(pair: Pair, options: TeacherOptions) -> Any:
    """Return the teacher if it needs no loaded weights: connected, or a cache on disk; else as it was given.

    Raises:
        ConfigurationError: a server is not there; a cache was made under other conditions; either belongs to another
            student.
        CacheError: a cache cannot be read or made.
    """
    kind = kind_of(pair.teacher, options)
    if options.teacher_cache is None or issubclass(kind, CachedTeacher):
        return kind.opened(pair, options) or pair.teacher
    behind = dataclasses.replace(pair, student=None)  # what is kept for later holds no student
    return CachedTeacher.in_front_of(lambda: load_teacher(behind, options), pair, options)


def load_teacher(pair: Pair, options: TeacherOptions, student: Callable[[], nn.Module] | None = None) -> Teacher:
    """Return the teacher, ready to be prepared: opened, or loaded by name, or a model in memory.

    Args:
        student: gives the student in its wrappers as they are now, for a teacher that shares its base.
    """
    teacher = pair.teacher
    if isinstance(teacher, Teacher):
        if isinstance(teacher, LocalTeacher) and options.teacher_placement != "auto":
            teacher.placement = options.teacher_placement
        return teacher
    return kind_of(teacher, options).loaded(pair, options, student)


def model_of(teacher: Any) -> nn.Module | None:
    """Return the model in memory that a teacher was given as."""
    source = source_of(teacher)
    return source if isinstance(source, nn.Module) else None


def teacher_tokenizer(
    teacher: Any, tokenizer: PreTrainedTokenizerBase, options: TeacherOptions
) -> PreTrainedTokenizerBase | None:
    """Load the teacher's tokenizer where its source holds one; else None, and only sizes can be compared."""
    if issubclass(kind_of(teacher, options), RemoteTeacher):
        return tokenizer  # its servers compare it with theirs
    name = teacher if isinstance(teacher, str) and has_files(teacher, options) else None
    model = model_of(teacher)
    if model is not None:
        name = models.source_of(model)
        if not name:
            logger.warning(
                "The teacher was made in memory and does not say where it came from, so its tokenizer could not be "
                "compared with the student's: they must be the same. Pass `teacher_processing_class` to check it."
            )
    if not name:
        return None
    if name == getattr(tokenizer, "name_or_path", None):
        return tokenizer
    try:
        return models.load_tokenizer(name, **options.files_of("teacher"))
    except ConfigurationError:  # it is there, and is damaged
        raise
    except (OSError, ValueError):
        logger.warning("No tokenizer was found beside the teacher %r: only vocabulary sizes can be compared.", name)
        return None


def compare_vocabularies(pair: Pair, options: TeacherOptions) -> None:
    """Compare vocabularies by configs alone, for models given by name: before weights are loaded."""
    if not (isinstance(pair.student, str) and isinstance(pair.teacher, str) and has_files(pair.teacher, options)):
        return
    roles = {"student": pair.student, "teacher": pair.teacher}
    configs = [models.load_config(name, role, **options.files_of(role)) for role, name in roles.items()]
    rows = [config.get_text_config().vocab_size for config in configs]
    shared_vocabulary(pair.tokenizer, pair.teacher_tokenizer, *rows)
