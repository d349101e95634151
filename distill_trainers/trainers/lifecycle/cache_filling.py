"""When a trainer's teacher answers from disk: what is refused, how the cache is opened, how it is filled ahead."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ... import models
from ...data.pairs import rows_of_pair
from ...data.rationales import rows_of_rationales
from ...exceptions import ConfigurationError
from ...losses import check_sparse
from ...losses.reduction import trained_mask
from ...signals import Sampled, TopK
from ...teachers import CachedTeacher, LocalTeacher, Teacher, shared_vocabulary
from ...teachers.cache.identity import (
    CacheIdentity,
    answering_settings,
    describe_source,
    hashed,
    read_identity,
    refuse_differences,
    tokenizer_fingerprint,
    write_identity,
)
from ...teachers.cache.kinds import CACHE_KINDS
from ...teachers.cache.shards import TeacherCache
from ...teachers.placement import is_collective
from ...teachers.rows import dataset_row_key
from .. import student as sources
from ..config import DistillConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..base import DistillTrainer

logger = logging.getLogger(__name__)

_SPARSE: dict[str, type[TopK] | type[Sampled]] = {"topk": TopK, "sampled": Sampled}


def check(trainer: DistillTrainer, teacher: Any, train_dataset: Any) -> None:
    """Refuse what a cached teacher cannot serve, before anything is loaded.

    Raises:
        ConfigurationError: naming the settings that exclude each other.
    """
    args = trainer.args
    cached = isinstance(teacher, CachedTeacher)
    if args.teacher_cache is None and not cached:
        return
    alone = _opened_alone(args) if args.teacher_placement == "cached" and not cached else teacher
    if args.teacher_cache is not None and isinstance(teacher, Teacher) and not isinstance(teacher, LocalTeacher):
        raise ConfigurationError(
            f"Got `teacher_cache: {args.teacher_cache}` and a {type(teacher).__name__}; expected a model or its name "
            "as `teacher_model` beside it. Leave one of them out."
        )
    kind = alone.identity.kind if isinstance(alone, CachedTeacher) else args.teacher_cache_kind
    check_kind(trainer, kind, "teacher_cache_kind")
    no_body = isinstance(alone, CachedTeacher) and not alone.can_load
    if no_body and trainer.replaces_completions:
        raise ConfigurationError(
            "The teacher's completions are to take the place of the dataset's, but a teacher cache alone cannot write "
            "any. Give the dataset completions and leave that setting out, or give a live `teacher_model`."
        )
    if not trainer.samples_completions:
        return
    if no_body:
        raise ConfigurationError(
            "The student's own completions are new at every step, so a teacher cache alone cannot judge them. Set "
            "`lmbda: 0`, or give a live `teacher_model` (with `teacher_cache` for the dataset's rows)."
        )
    if not trainer.needs_completions and not trainer.replaces_completions:
        raise ConfigurationError(
            f"Got `teacher_cache: {args.teacher_cache}`, but every step trains on the student's own completions, which "
            "are never seen twice. Leave `teacher_cache` out, or set lmbda below 1."
        )
    if train_dataset is not None and not hasattr(train_dataset, "__len__"):
        raise ConfigurationError(
            "Got `teacher_cache` with a stream and student rollouts: which rows come again cannot be known. Pass a "
            "`datasets.Dataset`, set `lmbda: 0`, or leave `teacher_cache` out."
        )


def check_kind(trainer: DistillTrainer, kind: str, setting: str) -> None:
    """Refuse a sparse kind of answers, cached or from afar, where the loss cannot be had from it."""
    args: Any = trainer.args
    if kind not in _SPARSE:
        return
    if not trainer.accepts_sparse_teachers:
        raise ConfigurationError(
            f"{type(trainer).__name__} needs the teacher's whole distribution, but `{setting}: {kind}` tells of "
            f"a few ids of each token. Use `{setting}: hidden`."
        )
    check_sparse(getattr(args, "divergence", "forward_kl"), _SPARSE[kind], args.kd_temperature)


def with_cache(teacher: Any, student: Any, own: PreTrainedTokenizerBase, other: Any, args: DistillConfig) -> Any:
    """The teacher in front of which the configured cache stands; any other teacher as it was given.

    Args:
        teacher, student: a name, a model or a `Teacher`, as the trainer was given them.
        own, other: tokenizers of student and teacher (the latter None if unknown).

    Raises:
        ConfigurationError: the cache was made under other conditions, or belongs to another tokenizer.
        CacheError: it cannot be read or made.
    """
    if isinstance(teacher, CachedTeacher):
        _check_vocabulary(teacher.identity, own, _rows_of(student, args))
        return teacher
    if args.teacher_cache is None:
        return teacher
    if args.teacher_placement == "cached":
        alone = _opened_alone(args)
        if teacher is not None:
            refuse_differences(args.teacher_cache, alone.identity, _identity(teacher, student, own, other, args))
        _check_vocabulary(alone.identity, own, _rows_of(student, args))
        return alone
    source = teacher.model if isinstance(teacher, LocalTeacher) else teacher
    identity = _identity(source, student, own, other, args)
    with args.main_process_first(desc="opening the teacher cache"):
        recorded = read_identity(args.teacher_cache)
        if recorded is None:
            if identity.files is not None:
                identity = dataclasses.replace(identity, files=hashed(identity.files))
            write_identity(args.teacher_cache, identity)
        else:
            refuse_differences(args.teacher_cache, recorded, identity)
    config = _config_of(source, args)

    def load() -> LocalTeacher:
        live = sources.load_teacher(teacher, args)
        assert isinstance(live, LocalTeacher)
        return live

    size, dtype = config.get_text_config().hidden_size, _dtype_of(source, config, args)

    def collective(accelerator: Accelerator) -> bool:
        return is_collective(args.teacher_placement, models.zero_stage(accelerator), models.fsdp_version(accelerator))

    cached = CachedTeacher(args.teacher_cache, load, hidden_size=size, dtype=dtype, collective=collective)
    cached.name = identity.teacher  # the folder may have moved
    return cached


def _opened_alone(args: DistillConfig) -> CachedTeacher:
    assert args.teacher_cache is not None
    return CachedTeacher(args.teacher_cache)


def missing_from_cache(
    teacher: str, student: str, own: Any, other: Any, args: DistillConfig, datasets: Iterable[Any]
) -> tuple[int, int, float]:
    """Tokenised rows that the configured cache lacks, their tokens, and about how many bytes they will take.

    Nothing is loaded or written. Streams, and rows that have no completion yet, are left out.

    Raises:
        ConfigurationError: the cache was made under other conditions.
    """
    identity = _identity(teacher, student, own, other, args)
    recorded = read_identity(args.teacher_cache)  # type: ignore[arg-type]
    known: TeacherCache | set[bytes] = set()
    if recorded is not None:
        refuse_differences(args.teacher_cache, recorded, identity)  # type: ignore[arg-type]
        known = TeacherCache(args.teacher_cache, recorded.stamp())  # type: ignore[arg-type]
    config = _config_of(teacher, args)
    kind = CACHE_KINDS[identity.kind](identity)
    each = kind.token_bytes(config.get_text_config().hidden_size, _dtype_of(teacher, config, args))
    counted = (dataset_row_key(row) for data in datasets if hasattr(data, "__len__") for row in _rows(data))
    missing = {key: count for key, count in counted if count and key not in known}
    return len(missing), sum(missing.values()), sum(missing.values()) * each


def _identity(source: Any, student: Any, own: Any, other: Any, args: DistillConfig) -> CacheIdentity:
    kind, sampled = args.teacher_cache_kind, args.teacher_cache_kind == "sampled"
    teacher_rows = _rows_of(source, args)
    shared = shared_vocabulary(own, other, _rows_of(student, args), teacher_rows)
    by_name = isinstance(source, str)
    settings: Any = dict(args.teacher_model_init_kwargs or {})  # type: ignore[arg-type]  # parsed by now
    if args.teacher_placement.startswith("quantized"):  # it answers otherwise than the whole one
        settings["placement"] = args.teacher_placement
    return CacheIdentity(
        kind=kind,
        dtype=args.teacher_cache_dtype,
        top_k=args.teacher_cache_top_k if kind == "topk" else None,
        draws=args.teacher_cache_draws if sampled else None,
        seed=args.seed if sampled else None,
        vocab_size=teacher_rows if kind == "hidden" or shared is None else shared,
        tokenizer=tokenizer_fingerprint(own),
        autocast="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        teacher_rows=teacher_rows,
        teacher_settings=answering_settings(settings),
        teacher=source if by_name else models.source_of(source) or type(source).__name__,
        files=describe_source(source, settings.get("revision")) if by_name else None,
        weights=None if by_name else LocalTeacher(source).fingerprint(),
    )


def _check_vocabulary(identity: CacheIdentity, own: Any, student_rows: int) -> None:
    if identity.tokenizer != tokenizer_fingerprint(own):
        raise ConfigurationError(
            f"The teacher cache of {identity.teacher!r} was made with another tokenizer than the student's: the same "
            "ids stand for other tokens. Use the tokenizer it was made with, or make a new cache."
        )
    shared = shared_vocabulary(own, own, student_rows, identity.teacher_rows)
    if identity.kind != "hidden" and (identity.teacher_rows if shared is None else shared) != identity.vocab_size:
        raise ConfigurationError(
            f"The teacher cache holds probabilities over {identity.vocab_size} ids, but student and teacher share "
            f"{shared}. Make a new cache for this student."
        )


def _config_of(source: Any, args: DistillConfig) -> Any:
    if not isinstance(source, str):
        return models.causal_lm_of(source).config
    return models.load_config(source, "student or teacher", trust_remote_code=args.trust_remote_code)


def _rows_of(source: Any, args: DistillConfig) -> int:
    return _config_of(source, args).get_text_config().vocab_size


def _dtype_of(source: Any, config: Any, args: DistillConfig) -> torch.dtype:
    """The dtype that the teacher has or is going to have."""
    settings: Any = args.teacher_model_init_kwargs or {}
    return models.dtype_of(
        settings.get("dtype") if isinstance(source, str) else models.causal_lm_of(source).dtype, config
    )


# ---- Which rows are recorded ----------------------------------------------------------------------------------------


def expect_rows(trainer: DistillTrainer, dataset: Any, name: str) -> None:
    """Tell a cached teacher which rows will come; rows without completion are told once they have one."""
    if isinstance(trainer.teacher, CachedTeacher) and dataset is not None:
        if hasattr(dataset, "__len__"):
            trainer.teacher.expect(_rows(dataset), why=f"the {name} rows")
        elif name == "training":
            trainer.teacher.expect_anything()
        else:
            trainer.teacher.keep_live()


def expect_all(
    trainer: DistillTrainer, teacher: Any, train_dataset: Any, eval_dataset: Any, *, before_loading: bool = False
) -> None:
    """What is known of rows when a trainer is built, and whether a live teacher must stay at hand.

    Called before models are loaded for a cache without a teacher behind it, so that what it lacks is told then, and
    after for others, since those load their teacher.
    """
    if not isinstance(teacher, CachedTeacher) or teacher.can_load == before_loading:
        return
    trainer.teacher = teacher
    if trainer.samples_completions:
        logger.warning("The live teacher is loaded beside its cache: it judges the student's own completions.")
        trainer.teacher.keep_live()
    if not trainer.replaces_completions:
        expect_rows(trainer, train_dataset, "training")
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
        for name, dataset in evaluated.items():
            expect_rows(trainer, dataset, name)


def _examples(dataset: Any) -> Iterator[list[dict[str, Any]]]:
    """The rows of each example: one, the two of a pair, or the two tasks of a rationale."""
    if "rejected_ids" in dataset.column_names:
        return map(rows_of_pair, dataset)
    if "other_input_ids" in dataset.column_names:
        return map(rows_of_rationales, dataset)
    return ([row] for row in dataset.select_columns(["input_ids", "loss_mask"]))


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    return itertools.chain.from_iterable(_examples(dataset))


class CacheKeeper(TrainerCallback):
    """Writes out what a cached teacher recorded wherever a run may end or go on from."""

    def __init__(self, teacher: CachedTeacher):
        self.teacher = teacher

    def _flush(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.flush()

    on_epoch_end = on_save = on_evaluate = on_train_end = _flush


# ---- Filling a cache ahead of training ------------------------------------------------------------------------------


def fill_cache(trainer: DistillTrainer, batch_size: int | None = None) -> dict[str, int]:
    """Ask the teacher for all training and evaluation rows that its cache lacks; processes share them.

    Args:
        batch_size: rows per forward of the teacher; by default `per_device_eval_batch_size`.

    Returns:
        numbers: `rows` that training and evaluation need, `computed` by all processes, `tokens` in the cache.

    Raises:
        ConfigurationError: the trainer has no teacher cache, or its data is a stream.
        CacheError: the cache cannot be written.
    """
    teacher, accelerator = trainer.teacher, trainer.accelerator
    if not isinstance(teacher, CachedTeacher):
        raise ConfigurationError("No teacher cache was named; set `teacher_cache` to a folder.")
    datasets = _datasets(trainer)
    if not all(hasattr(dataset, "__len__") for dataset in datasets):
        raise ConfigurationError(
            "A stream cannot be cached ahead of training, since nobody knows its rows. Train with `teacher_cache`, "
            "which records each row as it comes, or leave `streaming` out."
        )
    accelerator.wait_for_everyone()
    teacher.cache.refresh()
    todo: list[tuple[int, Any, int]] = []
    needed: set[bytes] = set()
    missing: set[bytes] = set()
    for dataset in datasets:
        for number, rows in enumerate(_examples(dataset)):
            keys = {key for key, count in map(dataset_row_key, rows) if count}
            new = {key for key in keys - missing if key not in teacher.cache}
            if new:
                todo.append((max(len(row["input_ids"]) for row in rows), dataset, number))
            needed |= keys
            missing |= new
    accelerator.wait_for_everyone()  # nobody writes before all know what is missing
    size = batch_size or trainer.args.per_device_eval_batch_size
    longest_first = sorted(todo, key=lambda each: -each[0])
    batches = [longest_first[i : i + size] for i in range(0, len(longest_first), size)]
    _ask_for(trainer, teacher, batches)
    teacher.flush()
    accelerator.wait_for_everyone()
    teacher.cache.refresh()
    return {"rows": len(needed), "computed": len(missing), "tokens": teacher.cache.num_tokens}


def _ask_for(trainer: DistillTrainer, teacher: CachedTeacher, batches: list[Any]) -> None:
    """Each process takes every so-manieth batch; a sharded teacher is asked equally often by all of them."""
    accelerator = trainer.accelerator
    world, rank = accelerator.num_processes, accelerator.process_index
    for turn in tqdm(range(-(-len(batches) // world)), desc="Teacher cache", disable=rank != 0):
        mine = turn * world + rank
        if mine >= len(batches) and not teacher.collective:
            break
        chosen = batches[min(mine, len(batches) - 1)]
        batch: Any = trainer._prepare_inputs(trainer.data_collator([dataset[number] for _, dataset, number in chosen]))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            teacher.signal(inputs, trained_mask(batch["labels"]), trainer.vocab_size)


def _datasets(trainer: DistillTrainer) -> list[Any]:
    """Training and evaluation rows as they will be trained on: with the teacher's completions where they are due."""
    found = []
    if trainer.train_dataset is not None:
        found.append(trainer.get_train_dataloader().dataset)
    evaluated = trainer.eval_dataset
    for name in evaluated if isinstance(evaluated, dict) else [None] if evaluated is not None else []:
        found.append(trainer.get_eval_dataloader(name).dataset)
    return found
