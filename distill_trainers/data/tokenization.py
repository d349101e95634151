"""Whole datasets of any layout to tokenised rows that can be trained on, with a count of what was cut and dropped."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill_trainers.data.arrow import class_names
from distill_trainers.data.feedback import COLUMNS, FeedbackRows, feedback_features
from distill_trainers.data.formats import (
    DatasetType,
    apply_column_mapping,
    detect_dataset_type,
    first_row,
    goes_on,
    reading,
)
from distill_trainers.data.labels import any_trained
from distill_trainers.data.plain import plain_dataset, without_late
from distill_trainers.data.reward_rows import REWARD_ROW, RewardRows
from distill_trainers.data.routing import TEACHER_INDEX, teacher_index
from distill_trainers.data.rows import TokenizedRow, is_text, tokenize_row, truncate
from distill_trainers.data.teacher_prompts import CONTEXT, TeacherPrompts
from distill_trainers.data.texts import special_beginning, tell_straddled
from distill_trainers.data.views import view_features
from distill_trainers.exceptions import ConfigurationError, DatasetError, NoUsableRowsError

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Needs", "TokenizedRow", "prepare_dataset", "tokenize_row", "truncate"]

logger = logging.getLogger(__name__)

Needs = Literal["completion", "prompt", "either", "both"]

_CODE = (
    *("formats.py", "arrow.py", "messages.py", "rendering.py", "chat.py", "turns.py", "conversations.py"),
    *("rows.py", "texts.py", "labels.py", "routing.py", "tokenization.py", "rationales.py"),
    *("teacher_prompts.py", "feedback.py", "reward_rows.py", "views.py", "other_tokenizer.py", "alignment.py"),
    "../answers/edit_distance.py",
)
_EMPTY_ROW = "empty row, or conversation that an assistant opens"
_EMPTY_COMPLETION = "empty completion"
_UNTRAINED = "no trained token (none marked, or all lost to truncation)"
_EMPTY_PROMPT = "empty prompt, or one that is part of its completion's first token"


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_new_tokens: int | None = None,
    column_mapping: Mapping[str, str] | None = None,
    assistant_only_loss: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    num_proc: int | None = None,
    needs: Needs = "completion",
    strict: bool = False,
    name: str = "train",
    teacher_prompts: TeacherPrompts | None = None,
    teachers: Sequence[str] = (),
    teacher_column: str = "teacher",
    feedback: FeedbackRows | None = None,
    rewards: RewardRows | None = None,
) -> Dataset | IterableDataset:
    """Tokenise a dataset of any layout, with the `length` of each row for batches of like-sized rows.

    Rows that cannot train are dropped. What was cut and dropped is logged once, in numbers; a stream is prepared as it
    is read, so nothing is counted there.

    Args:
        max_length: tokens of prompt and completion together; None never cuts.
        max_new_tokens: tokens that a rollout may add to a prompt; kept free within `max_length`.
        column_mapping: from the dataset's column names to those of a layout.
        needs: what a row must have: trained tokens ("completion", off-policy), a prompt ("prompt", on-policy), one of
            the two, or both.
        strict: raise at the first empty completion instead of dropping it.
        name: how messages call this dataset.
        teacher_prompts: write what the teacher reads in place of the prompt: rows then have `teacher_prompt_ids` and
            `view_start` (see `views.py`), and the `teacher_length` that its row may come to.
        teachers: names of several teachers; rows get a `teacher_index`, their teacher's place among these.
        teacher_column: names the teacher of each row.
        feedback: rows get `feedback`, what the teacher is told of an attempt is made of (see `feedback.py`), and the
            `teacher_length` that they may come to.
        rewards: rows get `reward_row`, what reward functions read of them (see `reward_rows.py`).

    Raises:
        DatasetError: no rows, an unknown layout, rows that cannot be tokenised, or none left to train on.
        ConfigurationError: `max_length` leaves no room for a prompt, or the teacher's prompts are not to be had.
    """
    from datasets import Dataset

    _check_lengths(max_length, max_new_tokens)
    dataset = apply_column_mapping(plain_dataset(dataset, name=name), column_mapping, name=name)
    row = first_row(dataset, name=name)
    dataset_type = detect_dataset_type(row, name=name)
    _check_type_serves(dataset_type, needs, assistant_only_loss, name)
    if teacher_prompts is not None:
        dataset = without_late(CONTEXT, dataset, row, name)
        teacher_prompts = teacher_prompts.reading(row, dataset_type, column_mapping, name)
    if feedback is not None:
        feedback = feedback.reading(row, dataset_type, column_mapping, name)
    rewards = None if rewards is None else rewards.reading(row, column_mapping, name)
    if tokenizer.eos_token_id is None:
        logger.warning("The tokenizer has no EOS token: a student trained on %r may not learn to stop.", name)
    work = partial(
        _prepare_row,
        tokenizer=tokenizer,
        dataset_type=dataset_type,
        assistant_only_loss=assistant_only_loss,
        chat_template_kwargs=chat_template_kwargs,
        answer_last=needs == "prompt",
        features=dataset.features,
        teacher_prompts=teacher_prompts,
        max_length=max_length,
        reserve=max_new_tokens or 0,
        needs=needs,
        strict=strict,
        name=name,
        code=code_fingerprint(),
        teachers=list(teachers),
        teacher_column=teacher_column,
        feedback=feedback,
        rewards=rewards,
        begin=special_beginning(tokenizer) if is_text(row, dataset_type) else None,
    )
    features = _features(
        teacher_prompts,
        routed=bool(teachers),
        feedback=feedback is not None,
        rewarded=rewards is not None,
    )
    map_rows: Any = partial(dataset.map, work, with_indices=True, remove_columns=list(row), features=features)
    if isinstance(dataset, Dataset):
        with reading(f"Dataset {name!r} cannot be read"):
            prepared = map_rows(num_proc=num_proc, desc=f"Tokenizing {name}")
        prepared = _drop(prepared, max_length, name, teacher_prompts)
    else:
        prepared = map_rows().filter(is_kept)
    return prepared.remove_columns([column for column in _TOLD if column in features])


def _prepare_row(
    row: Mapping[str, Any],
    index: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    reserve: int,
    needs: Needs,
    strict: bool,
    name: str,
    code: str,
    teacher_prompts: TeacherPrompts | None = None,
    teachers: Sequence[str] = (),
    teacher_column: str = "teacher",
    feedback: FeedbackRows | None = None,
    rewards: RewardRows | None = None,
    **settings: Any,  # of `tokenize_row`
) -> dict[str, Any]:
    views: dict[str, Any] = {}
    too_long = ""
    try:
        named = class_names(row, settings["features"])
        routed = {TEACHER_INDEX: teacher_index(named, teachers, teacher_column)} if teachers else {}
        settings |= {"teacher_prompts": teacher_prompts, "feedback": feedback, "rewards": rewards}
        whole: Any = tokenize_row(row, tokenizer, reserve=reserve, **settings)
        cut = truncate(whole, max_length, reserve, bos_token_id=tokenizer.bos_token_id)
        if teacher_prompts is not None:
            views, too_long = teacher_prompts.finished(whole, cut, reserve)
    except DatasetError as error:
        raise DatasetError(f"Row {index} of dataset {name!r}: {error}") from error
    dropped = _reason_to_drop(cut, needs) or too_long
    if strict and dropped == _EMPTY_COMPLETION:
        raise DatasetError(f"Row {index} of dataset {name!r} has an empty completion. Remove it, or set strict=False.")
    completion_length = len(whole["input_ids"]) - whole["prompt_length"]
    return {
        **cut,
        **views,
        **({} if feedback is None else {name: whole.get(name) for name in COLUMNS}),
        **({} if rewards is None else {REWARD_ROW: whole.get(REWARD_ROW)}),
        "length": len(cut["input_ids"]),
        "dropped": dropped,
        "goes_on": settings["dataset_type"] == "messages" and not settings["answer_last"] and goes_on(row),
        "prompt_cut": cut["prompt_length"] < whole["prompt_length"],
        "completion_cut": len(cut["input_ids"]) - cut["prompt_length"] < completion_length,
        "straddled": whole.get("straddled", 0),
        **routed,
    }


def _reason_to_drop(row: TokenizedRow, needs: Needs) -> str:
    has_prompt = row["prompt_length"] > 0
    trains = any_trained(row["labels"][1:])
    if not row["input_ids"]:
        return _EMPTY_ROW
    untrained = _EMPTY_COMPLETION if row["prompt_length"] == len(row["input_ids"]) else _UNTRAINED
    if needs == "either":
        return "" if has_prompt or trains else untrained
    if needs in ("prompt", "both") and not has_prompt:
        return _EMPTY_PROMPT
    return untrained if needs in ("completion", "both") and not trains else ""


def is_kept(row: Mapping[str, Any]) -> bool:
    """Tell whether a prepared row can be trained on."""
    return not row["dropped"]


def _drop(dataset: Dataset, max_length: int | None, name: str, prompts: TeacherPrompts | None) -> Dataset:
    flags = {column: dataset[column][:] for column in _TOLD if column in dataset.column_names}
    reasons = Counter(reason for reason in flags["dropped"] if reason)
    usable = [i for i, reason in enumerate(flags["dropped"]) if not reason]
    parts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    if not usable:
        raise NoUsableRowsError(
            f"None of the {len(dataset)} rows of dataset {name!r} can be trained on: {parts} (row 0: "
            f"{flags['dropped'][0]}). Check the columns (column_mapping), and max_length={max_length}."
        )
    news = []
    if reasons:
        first = next(i for i, reason in enumerate(flags["dropped"]) if reason)
        news.append(f"{len(dataset) - len(usable)} rows dropped ({parts}; the first is row {first})")
    unanswered = sum(flags["goes_on"][i] for i in usable)
    if unanswered:
        news.append(f"{unanswered} conversations go on after their last answer, and what follows it is left out")
    cut_prompts = sum(flags["prompt_cut"][i] for i in usable)
    cut_completions = sum(flags["completion_cut"][i] for i in usable)
    if cut_prompts or cut_completions:
        news.append(
            f"max_length={max_length} cut the beginning of {cut_prompts} prompts and the end of "
            f"{cut_completions} completions"
        )
    if news:
        logger.warning("Dataset %r, %d rows: %s.", name, len(dataset), "; ".join(news))
    tell_straddled(flags["straddled"], name)
    if prompts is not None:
        prompts.tell_lacking([flags["lacks"][i] for i in usable], name)
    return dataset.select(usable) if reasons else dataset


# Columns that are told of, and then go.
_TOLD = ("dropped", "goes_on", "prompt_cut", "completion_cut", "straddled", "lacks")


def _features(
    prompts: TeacherPrompts | None, *, routed: bool = False, feedback: bool = False, rewarded: bool = False
) -> Features:
    from datasets import Features, List, Value

    flag, number = Value("bool"), Value("int32")
    columns = {
        "input_ids": List(number),
        "labels": List(number),
        "prompt_length": number,
        "length": number,
        "dropped": Value("string"),
        "goes_on": flag,
        "prompt_cut": flag,
        "completion_cut": flag,
        "straddled": number,
    }
    columns |= {TEACHER_INDEX: number} if routed else {}
    columns |= feedback_features() if feedback else {}
    columns |= {REWARD_ROW: Value("string")} if rewarded else {}
    if prompts is not None:
        columns |= view_features(own_tokenizer=prompts.other is not None) | {"lacks": Value("string")}
    return Features(columns)


def _check_lengths(max_length: int | None, max_new_tokens: int | None) -> None:
    if max_length is not None and max_length < 2:
        raise ConfigurationError(
            f"max_length is {max_length}; a row needs at least 2 tokens, one to predict the other."
        )
    if max_length is not None and max_new_tokens is not None and max_new_tokens >= max_length:
        raise ConfigurationError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt within max_length={max_length}. Raise "
            "max_length, which counts prompt and completion together, or lower max_new_tokens."
        )


def _check_type_serves(dataset_type: DatasetType, needs: Needs, assistant_only_loss: bool, name: str) -> None:
    if dataset_type == "rationale":
        raise DatasetError(
            f"Dataset {name!r} holds questions with rationales, which only the method `rationale` reads. Use it, or "
            "map columns to a layout of this method, such as column_mapping={question: prompt, rationale: completion}."
        )
    if dataset_type == "prompt" and needs in ("completion", "both"):
        raise DatasetError(
            f"Dataset {name!r} has prompts alone, but training on given completions was asked for. Add a completion "
            "column (column_mapping renames one), or train on rollouts only (lmbda=1)."
        )
    if dataset_type == "text" and needs in ("prompt", "both"):
        raise DatasetError(
            f"Dataset {name!r} is plain text, which has no prompts to start rollouts from. Give prompt, "
            "prompt + completion or messages, or train off-policy (lmbda=0)."
        )
    if dataset_type == "text" and assistant_only_loss:
        raise DatasetError(
            f"assistant_only_loss needs conversations, but dataset {name!r} is plain text. Set it to false, or give "
            "messages."
        )


@cache
def code_fingerprint() -> str:
    """Identify the code that tokenises."""
    # datasets caches results of `map` under the arguments of the function, but not its code: a new release of this
    # package must not read rows that an older one tokenised.
    here = Path(__file__).parent
    code = b"".join((here / file).read_bytes() for file in _CODE)
    return hashlib.sha256(code).hexdigest()
