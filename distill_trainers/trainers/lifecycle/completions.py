"""The teacher's own completions for a dataset's prompts: generated once, kept on disk, read ever after."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ... import models
from ...data.labels import any_trained, completion_labels
from ...data.other_tokenizer import OtherTokenizer
from ...data.routing import TEACHER_INDEX
from ...data.views import OWN_COMPLETION, teacher_prompt
from ...randomness import Purpose, Role, Stream
from ...rollouts import CompletionSettings, CompletionStore, SamplingSettings, complete_prompts, local_engine
from ...rollouts.completing import Prompts
from ...rollouts.store import prompt_key
from ...run_files import COMPLETIONS_NAME
from ...teachers import Teacher
from ..config import DistillConfig
from ..protocol import Run


def sampling_settings(args: DistillConfig, model: Any, tokenizer: Any, vocab_size: int | None) -> SamplingSettings:
    """Say how `model` (student or teacher) is sampled under a config: it ends at its own end-of-text tokens.

    Args:
        model: None of a teacher behind a server.
        vocab_size: ids that may be sampled; None takes all of `model`.
    """
    known_ids = vocab_size or models.causal_lm_of(model).config.get_text_config().vocab_size
    return SamplingSettings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,  # type: ignore[arg-type]  # None has become its default
        top_k=args.top_k,  # type: ignore[arg-type]  # None has become its default
        eos_token_ids=models.eos_ids(model, tokenizer),
        pad_token_id=models.padding_id(tokenizer, known_ids),
        suppress_from=vocab_size,
        min_p=args.min_p,  # type: ignore[arg-type]  # None has become its default
        repetition_penalty=args.repetition_penalty,  # type: ignore[arg-type]  # None has become its default
        stop_strings=list(args.stop_strings or []),
    )


def teachers_text(args: DistillConfig) -> Stream:
    """Name the random numbers of the teacher's completions."""
    return Stream(args.seed, Role.TEACHER, Purpose.COMPLETION)


def completion_settings(
    args: DistillConfig, sampling: SamplingSettings, tokenizer: Any, stream: Stream
) -> CompletionSettings:
    """Say how a model that runs here completes prompts under a config."""
    engine = local_engine(args.rollout_engine, tokenizer)
    return CompletionSettings(sampling, stream, args.rollout_batch_size, engine)


def completion_store(
    args: DistillConfig, settings: CompletionSettings, rank: int = 0, **writer: str
) -> CompletionStore:
    """Open the store of a run for one model's completions, as in `teacher=fingerprint`."""
    root = Path(args.completions_dir or Path(args.output_dir) / COMPLETIONS_NAME)
    return CompletionStore(root, settings.identity(**writer), rank)


def student_prompt(row: Mapping[str, Any]) -> list[int]:
    """Return the prompt of a tokenised row."""
    return list(row["input_ids"][: row["prompt_length"]])


def prompts_to_complete(
    rows: Iterable[Mapping[str, Any]],
    *,
    replace: bool,
    owner: int = 0,
    of: Callable[[Mapping[str, Any]], list[int]] = teacher_prompt,
) -> Prompts:
    """List prompts of tokenised rows without completion, or of all rows with `replace`, by key.

    Args:
        owner: of several teachers, the one whose rows are meant.
        of: whose prompt it is: the teacher's own, where a row has one for it, or `student_prompt`.
    """
    prompts: Prompts = {}
    for row in rows:
        if row.get(TEACHER_INDEX, owner) != owner:
            continue
        if replace or not any_trained(row["labels"]):
            ids = of(row)
            prompts.setdefault(prompt_key(ids), ids)
    return prompts


def with_completions(
    dataset: Any,
    completions: Mapping[str, list[int]],
    *,
    replace: bool,
    owner: int = 0,
    other: OtherTokenizer | None = None,
    max_length: int | None = None,
) -> Any:
    """Add the given completions to `dataset` where it has none, or everywhere with `replace`.

    Args:
        owner: as in `prompts_to_complete`.
        other: the completions are in the ids of a teacher with a tokenizer of its own.
        max_length: with `other`, tokens of a row, whose end is cut: nobody counted the student's while it was written.
    """

    def fill(row: dict[str, Any]) -> dict[str, Any]:
        if row.get(TEACHER_INDEX, owner) != owner:
            return row
        prompt = student_prompt(row)
        completion = completions.get(prompt_key(teacher_prompt(row)))
        if completion is None or (any_trained(row["labels"]) and not replace):
            return row
        own: dict[str, Any] = {}
        if other is not None:
            asked = row["teacher_prompt_ids"]
            completion = other.answer(completion, prompt, asked)[: max_length and max(1, max_length - len(prompt))]
            own[OWN_COMPLETION] = other.completion(completion, asked, prompt)
            own["teacher_length"] = len(asked) + len(own[OWN_COMPLETION])
        ids, labels = prompt + completion, completion_labels(prompt, completion)
        return {**row, "input_ids": ids, "labels": labels, "length": len(ids), **own}

    return dataset.map(fill, desc="Teacher completions", load_from_cache_file=False)


def fill_with_teacher_completions(run: Run, dataset: Any, *, replace: bool) -> Any:
    """Add the teacher's completions to a run's `dataset`; each process generates its share, each prompt once.

    Of several teachers, each writes those of its own rows.
    """
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or "labels" not in columns or not hasattr(dataset, "__len__"):
        return dataset
    for owner, teacher in enumerate(run.teacher.writers):
        prompts = prompts_to_complete(dataset, replace=replace, owner=owner)
        if prompts:
            completions = _written_by(teacher, prompts, run)
            other = run.requirements.other and run.requirements.other.ended_by(
                teacher=teacher.eos_ids(teachers_tokenizer(run))
            )
            ids = {"other": other, "max_length": run.args.max_length}
            dataset = with_completions(dataset, completions, replace=replace, owner=owner, **ids)
    return dataset


def teachers_tokenizer(run: Run) -> Any:
    """Return the tokenizer in whose ids the teacher writes."""
    return run.processing_class if run.requirements.other is None else run.requirements.teacher_tokenizer


def _written_by(teacher: Teacher, prompts: Prompts, run: Run) -> Mapping[str, list[int]]:
    accelerator, args = run.accelerator, run.args
    if not teacher.can_generate:
        teacher.live()  # it says why
    tokenizer = teachers_tokenizer(run)
    sampling = sampling_settings(args, run.model, run.processing_class, run.vocab_size)
    sampling = dataclasses.replace(sampling, eos_token_ids=teacher.eos_ids(tokenizer))
    if tokenizer is not run.processing_class:
        sampling = dataclasses.replace(sampling, pad_token_id=tokenizer.pad_token_id or 0)
    settings = completion_settings(args, sampling, tokenizer, teachers_text(args))
    store = completion_store(args, settings, accelerator.process_index, teacher=teacher.fingerprint())
    return complete_prompts(prompts, teacher.generating(accelerator), accelerator, settings, store)
