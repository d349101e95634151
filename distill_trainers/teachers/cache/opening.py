"""What a teacher cache depends on in a run, whether it is this run's, and what it still lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ... import models
from ...exceptions import ConfigurationError
from ..base import Pair
from ..local import LocalTeacher
from ..rows import dataset_row_key
from ..vocabulary import shared_vocabulary
from .identity import (
    CacheIdentity,
    answering_settings,
    describe_source,
    first_bytes_fingerprint,
    hashed,
    read_identity,
    refuse_differences,
    tokenizer_fingerprint,
    write_identity,
)
from .kinds import NextBytesKind
from .packing import CACHE_KINDS
from .shards import TeacherCache

if TYPE_CHECKING:
    from ..options import TeacherOptions


def source_of(teacher: Any) -> Any:
    """Return the name or the model behind a teacher as it was given."""
    return teacher.model if isinstance(teacher, LocalTeacher) else teacher


def identity_of(pair: Pair, options: TeacherOptions) -> CacheIdentity:
    """Return what the answers in a cache of this run depend on."""
    source = source_of(pair.teacher)
    kind, sampled = options.teacher_cache_kind, options.teacher_cache_kind == "sampled"
    teacher_rows = rows_of(source, options)
    shared = None
    if pair.student is not None:
        student_rows = rows_of(pair.student, options, "student")
        shared = shared_vocabulary(pair.tokenizer, pair.teacher_tokenizer, student_rows, teacher_rows)
    settings: Any = dict(options.teacher_model_init_kwargs or {})  # type: ignore[arg-type]  # parsed by now
    if options.teacher_placement.startswith("quantized"):  # it answers otherwise than the whole one
        settings["placement"] = options.teacher_placement
    vocab_size = teacher_rows if kind == "hidden" or shared is None else shared
    return CacheIdentity(
        kind=kind,
        dtype=options.teacher_cache_dtype or _unset_dtype(options, vocab_size),
        top_k=options.teacher_cache_top_k if kind == "topk" else None,
        draws=options.teacher_cache_draws if sampled else None,
        seed=options.seed if sampled else None,
        vocab_size=vocab_size,
        teacher_rows=teacher_rows,
        weights=None if isinstance(source, str) else LocalTeacher(source).fingerprint(),
        **whose_answers(source, settings, pair.tokenizer, options) | {"tokenizer": _ids_of(pair.tokenizer, kind)},
    )


def _ids_of(tokenizer: Any, kind: str) -> str:
    """What the numbers of a cache depend on of a tokenizer."""
    ids = tokenizer_fingerprint(tokenizer)
    return f"{ids}-{first_bytes_fingerprint(tokenizer)}" if kind == NextBytesKind.name else ids


def _unset_dtype(options: TeacherOptions, vocab_size: int) -> str | None:
    """What no `teacher_cache_dtype` means: as the folder has it; for a new top k that leaves ids out, eight bits."""
    if options.teacher_cache_kind != "topk":
        return None
    recorded = read_identity(str(options.teacher_cache))
    if recorded is not None:
        return recorded.dtype
    return "int8" if options.teacher_cache_top_k < vocab_size else None


def whose_answers(source: Any, settings: Any, tokenizer: Any, options: TeacherOptions) -> dict[str, Any]:
    """Return the fields of an identity that say which model answers, how precisely, about which tokens.

    Args:
        settings: keyword arguments of `from_pretrained`.
    """
    by_name = isinstance(source, str)
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "autocast": "bf16" if options.bf16 else "fp16" if options.fp16 else "no",
        "teacher_settings": answering_settings(settings),
        "teacher": source if by_name else models.source_of(source) or type(source).__name__,
        "files": describe_source(source, settings.get("revision")) if by_name else None,
    }


def record_identity(
    folder: str, identity: CacheIdentity, options: TeacherOptions, setting: str = "teacher_cache"
) -> CacheIdentity:
    """Compare what the folder of `setting` says it holds with `identity`; a new folder is told."""
    with options.main_process_first(desc=f"opening {setting}"):
        recorded = read_identity(folder)
        if recorded is None:
            files = None if identity.files is None else hashed(identity.files)
            recorded = dataclasses.replace(identity, files=files)
            write_identity(folder, recorded)
        else:
            refuse_differences(folder, recorded, identity, setting)
    return recorded


def check_vocabulary(identity: CacheIdentity, tokenizer: Any, student_rows: int | None) -> None:
    """Refuse a cache whose ids are not those of `tokenizer`, the student's or, with None as its rows, the teacher's."""
    if identity.tokenizer != _ids_of(tokenizer, identity.kind):
        whose = "the teacher's (`teacher_tokenizer`)" if student_rows is None else "the student's"
        raise ConfigurationError(
            f"The teacher cache of {identity.teacher!r} was made with another tokenizer than {whose}: the same "
            "ids stand for other tokens. Use the tokenizer it was made with, or make a new cache."
        )
    if student_rows is None:
        return
    shared = shared_vocabulary(tokenizer, tokenizer, student_rows, identity.teacher_rows)
    if identity.kind != "hidden" and (identity.teacher_rows if shared is None else shared) != identity.vocab_size:
        raise ConfigurationError(
            f"The teacher cache holds probabilities over {identity.vocab_size} ids, but student and teacher share "
            f"{shared}. Make a new cache for this student."
        )


def missing_from_cache(
    pair: Pair, options: TeacherOptions, rows: Iterable[Mapping[str, Any]]
) -> tuple[int, int, float]:
    """Count the tokenised rows that the configured cache lacks, their tokens, and about how many bytes they take.

    Nothing is loaded or written.

    Raises:
        ConfigurationError: the cache was made under other conditions.
    """
    identity, folder = identity_of(pair.of_ids() if options.has_own_tokenizer else pair, options), options.teacher_cache
    assert folder is not None
    recorded = read_identity(folder)
    known: TeacherCache | set[bytes] = set()
    if recorded is not None:
        refuse_differences(folder, recorded, identity)
        known = TeacherCache(folder, recorded.stamp())
    config = config_of(pair.teacher, options)
    kind = CACHE_KINDS[identity.kind](identity)
    size = kind.token_bytes(config.get_text_config().hidden_size, dtype_of(pair.teacher, config, options))
    missing = {key: count for key, count in map(dataset_row_key, rows) if count and key not in known}
    return len(missing), sum(missing.values()), sum(missing.values()) * size


def config_of(source: Any, options: TeacherOptions, role: str = "teacher") -> Any:
    """Return the configuration of a model, or of a name."""
    if not isinstance(source, str):
        return models.causal_lm_of(source).config
    return models.load_config(source, role, **options.files_of(role))


def rows_of(source: Any, options: TeacherOptions, role: str = "teacher") -> int:
    """Count the rows of its output head."""
    return config_of(source, options, role).get_text_config().vocab_size


def dtype_of(source: Any, config: Any, options: TeacherOptions) -> torch.dtype:
    """Return the dtype that the teacher has or is going to have."""
    settings: Any = options.teacher_model_init_kwargs or {}
    told = settings.get("dtype") if isinstance(source, str) else models.causal_lm_of(source).dtype
    return models.dtype_of(told, config)
