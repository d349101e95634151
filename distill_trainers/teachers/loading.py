"""From what a user gave as the teacher to a `Teacher`: its kind, what is refused, how it is opened and loaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import models
from ..data.other_tokenizer import OtherTokenizer
from ..exceptions import ConfigurationError
from ..requirements import Requirements
from ..settings import shown
from .base import NoTeacher, Pair, Teacher, is_remote, named
from .cache.kinds import told_kind
from .cache.opening import source_of
from .cache.teacher import CachedTeacher
from .composed import ComposedTeacher, refuse_part
from .local import LocalTeacher
from .members import Member, Members, composed_of, names_of, naming, own_options
from .options import OWN, TeacherOptions
from .remote.teacher import RemoteTeacher
from .routed import RoutedTeacher, told_by_all
from .self_teacher import AdapterOff, AveragedStudent, InitialStudent, LiveStudent
from .several import Several, refuse_writing
from .shared_base import SharedBase
from .vocabulary import shared_vocabulary

logger = logging.getLogger(__name__)

# Placements that are a kind of their own; all others are places of a `LocalTeacher`. Several teachers are no placement:
# each of them has one.
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
    if isinstance(teacher, Mapping):
        return RoutedTeacher if not options.composes_teachers or names_of(teacher, options) else ComposedTeacher
    kind = KINDS.get(placement_of(teacher, options))
    if kind is not None:
        return kind
    if isinstance(teacher, Teacher):
        return type(teacher)
    return NoTeacher if teacher is None else LocalTeacher


def each_teacher(teacher: Any, options: TeacherOptions) -> Iterator[tuple[str, Member]]:
    """Iterate over what is given of each teacher, by name; over the only one, or over several without the student."""
    if isinstance(teacher, Members):
        yield from ((name, member) for name, member in teacher.items() if not member.is_initial)
    else:
        yield "", Member(teacher, options)


def kinds_of(teacher: Any, options: TeacherOptions) -> list[type[Teacher] | Teacher]:
    """Return what each of several teachers is or is going to be, or the only one."""
    if isinstance(teacher, Several):
        return list(teacher.leaves.values())
    members = [member for _, member in each_teacher(teacher, options)]
    return [CachedTeacher if m.options.teacher_cache is not None else kind_of(m.given, m.options) for m in members]


def told_by(teacher: Any, options: TeacherOptions) -> set[str]:
    """Name what a teacher, or each of several, is going to tell of a token: `hidden`, `topk`, `token_logprobs`, …"""
    if isinstance(teacher, Several):
        told = [leaf.tells for leaf in teacher.leaves.values()]
    else:
        told = [_tells(member) for _, member in each_teacher(teacher, options)]
    return {kind.partition(" ")[0] for kind in told}


def may_write(teacher: Any, options: TeacherOptions) -> bool:
    """Tell whether completions can be had of a teacher, as it was given: of each one's rows, if they are several."""
    if isinstance(teacher, Several):
        return teacher.can_generate
    return not options.composes_teachers and all(kind.can_generate for kind in kinds_of(teacher, options))


def has_files(teacher: Any, options: TeacherOptions) -> bool:
    """Tell whether the configuration and tokenizer of a teacher, as it was given, can be read before it is loaded."""
    return teacher is not None and kind_of(teacher, options).has_files


def is_initial_student(teacher: Any, options: TeacherOptions) -> bool:
    """Tell whether a teacher is the student before training, from settings alone."""
    initial = options.teacher_adapter is None and placement_of(teacher, options) in ("initial", "adapter_off")
    return teacher is None and initial


def refuse(pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
    """Refuse a teacher that cannot serve, from settings alone: nothing is loaded, no server is asked.

    Raises:
        ConfigurationError: naming what was got, what was expected and what to do.
    """
    teacher, placement = pair.teacher, options.teacher_placement
    if isinstance(teacher, Members):
        _refuse_several(pair, teacher, options, wants)
        return
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
    others: list[type[Teacher]] = [*KINDS.values(), RoutedTeacher, ComposedTeacher]
    for other in others:
        if not issubclass(kind, other):
            other.refuse_idle(options)


def open_teacher(pair: Pair, options: TeacherOptions) -> Any:
    """Return the teacher if it needs no loaded weights: connected, or a cache on disk; else as it was given.

    Raises:
        ConfigurationError: a server is not there; a cache was made under other conditions; either belongs to another
            student.
        CacheError: a cache cannot be read or made.
    """
    if isinstance(pair.teacher, Members):
        return _open_several(pair, pair.teacher, options)
    pair = pair.of_ids() if options.has_own_tokenizer else pair
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
    if isinstance(teacher, Members):
        return _load_several(pair, teacher, options, student)
    if isinstance(teacher, Teacher):
        if isinstance(teacher, LocalTeacher) and options.teacher_placement != "auto":
            teacher.placement = options.teacher_placement
        return teacher
    return kind_of(teacher, options).loaded(pair, options, student)


def model_of(teacher: Any) -> nn.Module | None:
    """Return the model in memory that a teacher was given as."""
    source = source_of(teacher)
    return source if isinstance(source, nn.Module) else None


def teacher_tokenizer(teacher: Any, tokenizer: PreTrainedTokenizerBase, options: TeacherOptions) -> Any:
    """Load the teacher's tokenizer where its source holds one; else None, and only sizes can be compared.

    Of several teachers, by name.
    """
    if options.has_own_tokenizer:
        return _own_tokenizer(teacher, options)
    if isinstance(teacher, Several):  # made by hand
        return {name: teacher_tokenizer(leaf, tokenizer, options) for name, leaf in teacher.leaves.items()}
    if isinstance(teacher, Members):
        return {
            name: tokenizer if member.is_initial else teacher_tokenizer(member.given, tokenizer, member.options)
            for name, member in teacher.items()
        }
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


def _own_tokenizer(teacher: Any, options: TeacherOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of `teacher_tokenizer`: the one it names, or the one beside the teacher."""
    name: str | None = options.teacher_tokenizer
    setting = f"`teacher_tokenizer: {name}`"
    if name == OWN:
        model = model_of(teacher)
        known = teacher if isinstance(teacher, str) and has_files(teacher, options) else None
        name = known if model is None else models.source_of(model)
    if name:
        try:
            return models.load_tokenizer(name, **options.files_of("teacher"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"Got {setting}, but no tokenizer could be read from {name!r}: {shown(error)}. Name the folder or Hub "
                "id of the teacher's tokenizer as `teacher_tokenizer`, or pass it as `teacher_processing_class`."
            ) from error
    raise ConfigurationError(
        f"Got {setting}, but nothing says what the tokenizer of the teacher {named(teacher)} is; expected one beside "
        "it. Name its folder or Hub id as `teacher_tokenizer`, or pass it as `teacher_processing_class`."
    )


def other_tokenizer(pair: Pair, options: TeacherOptions) -> OtherTokenizer | None:
    """Return what writes the teacher's ids of the student's text, if it has a tokenizer of its own.

    Args:
        pair: with the tokenizers that were found.

    Raises:
        ConfigurationError: ids of one of them do not tell the bytes they stand for.
    """
    return OtherTokenizer.of(pair.tokenizer, pair.teacher_tokenizer) if options.has_own_tokenizer else None


def rendering_tokenizer(pair: Pair, options: TeacherOptions) -> tuple[Any, str]:
    """Return the tokenizer whose chat template renders what the teacher is asked, and why there is none.

    A teacher whose tokenizer is unknown, or has no template, is asked in the student's.

    Args:
        pair: with the tokenizers that were found.

    Returns:
        the tokenizer, None for the student's; and the end of a sentence, empty if nothing is wrong: several teachers
        read one prompt, so they must have one template.
    """
    theirs = pair.teacher_tokenizer
    if options.has_own_tokenizer:
        lacks = (
            "its tokenizer has no chat template; expected one, since each model reads a conversation in its own form. "
            "Set `chat_template` of the teacher's tokenizer, or give prompts and completions as plain text."
        )
        return theirs, "" if getattr(theirs, "chat_template", None) else lacks
    if not isinstance(theirs, Mapping):
        return (theirs if getattr(theirs, "chat_template", None) else None), ""
    names = _used(pair.teacher, options) if isinstance(pair.teacher, Members) else list(theirs)
    asked = {n: theirs[n] if getattr(theirs.get(n), "chat_template", None) else pair.tokenizer for n in names}
    first, *others = asked
    unlike = [name for name in others if asked[name].chat_template != asked[first].chat_template]
    if not unlike:
        return asked[first], ""
    return None, (
        f"the teachers {first!r} and {', '.join(map(repr, unlike))} have different chat templates; expected one, since "
        "a row has one prompt for all teachers. Give their tokenizers the same `chat_template`, pass the tokenizer "
        "that renders for all as `teacher_processing_class`, or give prompts as plain text."
    )


def compare_vocabularies(pair: Pair, options: TeacherOptions) -> None:
    """Compare vocabularies by configs alone, for models given by name: before weights are loaded."""
    if options.has_own_tokenizer:
        return
    if isinstance(pair.teacher, Members):
        for name, member in each_teacher(pair.teacher, options):
            with naming(name):
                compare_vocabularies(pair_of(pair, name, member), member.options)
        return
    if not (isinstance(pair.student, str) and isinstance(pair.teacher, str) and has_files(pair.teacher, options)):
        return
    roles = {"student": pair.student, "teacher": pair.teacher}
    configs = [models.load_config(name, role, **options.files_of(role)) for role, name in roles.items()]
    rows = [config.get_text_config().vocab_size for config in configs]
    shared_vocabulary(pair.tokenizer, pair.teacher_tokenizer, *rows)


# ---- Several --------------------------------------------------------------------------------------------------------


def pair_of(pair: Pair, name: str, member: Member) -> Pair:
    """Return the student and one of several teachers."""
    tokenizer = pair.teacher_tokenizer
    theirs = tokenizer.get(name) if isinstance(tokenizer, Mapping) else tokenizer
    return dataclasses.replace(pair, teacher=member.given, teacher_tokenizer=theirs)


def _refuse_several(pair: Pair, members: Members, options: TeacherOptions, wants: Requirements) -> None:
    composed = composed_of(options, members)
    if wants.keeps_reference:
        raise ConfigurationError(
            f"Got `reference_logps_dir` with the teachers {', '.join(members)}; expected one model or its name: what "
            "is kept there is known by one model's files, not by how several are composed. Leave one of them out."
        )
    kind_of(members, options).refuse(dataclasses.replace(pair, teacher=None), options, wants)
    if composed and wants.replaces_completions:
        refuse_writing("teachers that are composed", wants)
    told = {}
    for name, member in each_teacher(members, options):
        with naming(name):
            refuse(pair_of(pair, name, member), member.options, wants)
            told[name] = _tells(member)
    for name in {part for weights in composed.values() for part in weights} & told.keys():
        refuse_part(name, told[name])
    if not composed:
        told_by_all(told)
    if kind_of(members, options) is ComposedTeacher:
        RoutedTeacher.refuse_idle(options)


def _tells(member: Member) -> str:
    """What a teacher is going to tell of a token (`Teacher.tells`), before it is opened."""
    options, given = member.options, member.given
    if isinstance(given, Teacher) and options.teacher_cache is None:
        return given.tells
    if options.teacher_placement == "cached":
        return CachedTeacher(str(options.teacher_cache)).tells
    if options.teacher_cache is not None:
        return told_kind(options.teacher_cache_kind, options.teacher_cache_top_k, options.teacher_cache_draws)
    if issubclass(kind_of(given, options), RemoteTeacher):
        return told_kind(options.teacher_server_kind, options.teacher_server_top_k, options.teacher_server_draws)
    return "hidden"


def _open_several(pair: Pair, members: Members, options: TeacherOptions) -> Any:
    """The teachers, those opened that need no weights here; made one at once if that is all of them."""
    opened = Members()
    used = _used(members, options)
    for name, member in members.items():
        given = member.given
        if not member.is_initial and member.adapter is None and name in used:
            with naming(name):
                given = open_teacher(pair_of(pair, name, member), member.options)
        opened[name] = dataclasses.replace(member, given=given)
    if all(isinstance(opened[name].given, Teacher) for name in used):
        return _made_one({name: opened[name].given for name in used}, opened, options, told_late=False)
    return opened


def _load_several(
    pair: Pair, members: Members, options: TeacherOptions, student: Callable[[], nn.Module] | None
) -> Teacher:
    names = _used(members, options)
    bases, teachers = _shared_bases(members, names), dict[str, Teacher]()
    for name in names:
        member = members[name]
        with naming(name):
            if member.is_initial:
                placed = {"self_teacher": "initial", "teacher_placement": "auto"}
                own = own_options(options, {**placed, "teacher_model_init_kwargs": None})  # those are of the others
                teachers[name] = InitialStudent.loaded(pair, own, student)
            elif name in bases:
                teachers[name] = bases[name].teacher(member.adapter)
            else:
                teachers[name] = load_teacher(pair_of(pair, name, member), member.options, student)
    return _made_one(teachers, members, options, told_late=True)


def _used(members: Members, options: TeacherOptions) -> list[str]:
    """Name the members that have a say: one that is weighted by 0 is not loaded."""
    composed = composed_of(options, members)
    parts = {part for weights in composed.values() for part in weights}
    return [name for name in members if not composed or name in parts]


def _made_one(
    teachers: Mapping[str, Teacher], members: Members, options: TeacherOptions, *, told_late: bool
) -> Teacher:
    composed = composed_of(options, members)
    if not composed:
        return RoutedTeacher(teachers, told_late=told_late)
    arithmetic = options.teacher_mix == "arithmetic"
    made: dict[str, Teacher] = {
        name: ComposedTeacher(
            {part: teachers[part] for part in weights}, weights, arithmetic=arithmetic, told_late=told_late
        )
        for name, weights in composed.items()
    }
    return next(iter(made.values())) if len(made) == 1 else RoutedTeacher(made, told_late=told_late)


def _shared_bases(members: Members, names: list[str]) -> dict[str, SharedBase]:
    """Load each base that adapters share, or an adapter and a teacher that is its base: by the names of these."""
    groups: dict[str, list[str]] = {}
    for name in names:
        member, options = members[name], members[name].options
        if isinstance(member.given, str) and kind_of(member.given, options) is LocalTeacher:
            key = repr((member.given, options.teacher_placement, options.teacher_model_init_kwargs))
            groups.setdefault(key, []).append(name)
    bases: dict[str, SharedBase] = {}
    for group in groups.values():
        adapters = [adapter for name in group if (adapter := members[name].adapter) is not None]
        if adapters:
            bases |= dict.fromkeys(group, _load_base(members[group[0]], adapters))
    return bases


def _load_base(member: Member, adapters: list[str]) -> SharedBase:
    options, placement = member.options, member.options.teacher_placement
    placement = "replicate" if placement == "auto" else placement
    given: Any = options.teacher_model_init_kwargs or {}
    settings = {"trust_remote_code": options.trust_remote_code, **given}
    with models.loading_placed(member.given, placement, options.device, settings) as placed:
        model = models.load_causal_lm(member.given, role="teacher", **placed)
    return SharedBase(model, member.given, adapters, placement)
