"""Batches that are counted in tokens: how many a row takes, and what cannot be counted so."""

from __future__ import annotations

import logging
import math
from dataclasses import fields
from typing import Any, NoReturn

from datasets import Dataset
from transformers import TrainingArguments

from ... import models
from ...data.token_batches import TokenBatches
from ...exceptions import ConfigurationError, DatasetError
from ...requirements import Requirements
from ...settings import require
from ...teachers.placement import PLACEMENTS

logger = logging.getLogger(__name__)

NAME = "per_device_train_tokens"
_ROWS = "Set `per_device_train_batch_size` in its place"


def check_token_batches(args: Any) -> None:
    """Refuse settings of a `DistillConfig` that count rows.

    Raises:
        ConfigurationError: naming the setting.
    """
    tokens = args.per_device_train_tokens
    if tokens is None:
        return
    why = args.why_fixed_rows
    require(not why, NAME, tokens, f"none where {why}. {_ROWS}")
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    beside = {
        "per_device_train_batch_size": "none, or its default, beside `per_device_train_tokens`: both say how large a "
        "batch is",
        "train_sampling_strategy": "random with `per_device_train_tokens`, whose batches are of like lengths anyway",
        "auto_find_batch_size": "false with `per_device_train_tokens`: there is no number of rows to be lowered",
    }
    for name, expected in beside.items():
        value = getattr(args, name)
        require(value == defaults[name], name, value, expected)
    copies = copies_of_row(args)
    require(tokens >= copies, NAME, tokens, f"{copies} or more, as a batch has up to {copies} sequences of each row")
    fits = not args.packing or args.max_length is None or tokens >= args.max_length
    require(fits, NAME, tokens, f"at least `max_length: {args.max_length}` with `packing`, the length of a packed row")


def check_token_rows(args: Any, wants: Requirements, reads_text: bool) -> None:
    """Refuse data and students whose tokens are not known before, or that are not all in a row.

    Args:
        reads_text: whether there is a dataset of plain text with a weight.

    Raises:
        ConfigurationError, DatasetError: what there is, and what to do.
    """
    got = f"Got `{NAME}: {args.per_device_train_tokens}` with"
    if args.per_device_train_tokens is None:
        return
    if wants.streams_rows:
        refuse_stream(args)
    if wants.encoder_decoder:
        raise ConfigurationError(
            f"{got} an encoder-decoder, which pads prompts and completions apart; expected a causal LM. {_ROWS}."
        )
    if reads_text:
        raise ConfigurationError(
            f"{got} a `pretraining_dataset`, of which each batch gets a number of rows of any length; expected none, "
            f"or `pretraining_weight: 0`. {_ROWS}."
        )
    if args.why_no_packing and args.gradient_accumulation_steps == 1 and args.process_index == 0:
        logger.warning(
            "%s `gradient_accumulation_steps: 1`: each step has rows of one length and the same weight, many short or "
            "few long ones. What the loss counts by rows (pairs, tasks, sampled completions) then learns from a long "
            "row several times what it does from a short one. With 4 or more, each step has rows of all lengths.",
            got,
        )


def refuse_stream(args: Any) -> NoReturn:
    """Refuse rows whose lengths nobody knows before.

    Raises:
        DatasetError: what to do.
    """
    raise DatasetError(
        f"Got `{NAME}: {args.per_device_train_tokens}` with a stream, the lengths of whose rows nobody knows before; "
        f"expected a `datasets.Dataset`. {_ROWS}."
    )


def refuse_uneven_sampling(args: Any, accelerator: Any, samples: bool) -> None:
    """Refuse processes that share a model and would call it a different number of times.

    Raises:
        ConfigurationError: the prompts of a process, whose number is its own, are sampled in several calls.
    """
    if args.per_device_train_tokens is None or args.rollout_batch_size is None or not samples:
        return
    if models.zero_stage(accelerator) == 3 or models.fsdp_version(accelerator) is not None:
        whose, instead = "student", "launch with DDP"
    elif _mixes_sharded_teacher(args) and accelerator.num_processes > 1:
        whose, instead = "teacher", "set `teacher_placement: replicate` or `teacher_mix_alpha: 0`"
    else:
        return
    raise ConfigurationError(
        f"Got `rollout_batch_size: {args.rollout_batch_size}` with `{NAME}` and a {whose} that is sharded over "
        "processes, which have different numbers of prompts then, but must call it equally often; expected no "
        f"`rollout_batch_size`, so that all prompts of a step are sampled at once. Leave it out, or {instead}."
    )


def _mixes_sharded_teacher(args: Any) -> bool:
    return bool(hasattr(args, "teacher_mix_alpha") and args.alpha and PLACEMENTS[args.teacher_placement].shards)


def row_tokens(rows: Dataset, args: Any, *, sampled: bool) -> list[int]:
    """Count the tokens of each row of a tokenised dataset as it lies in a batch, for the student or for the teacher.

    Of a row with two sequences they are those of the longer one, to which both are padded.

    Args:
        sampled: whether the student may write `max_new_tokens` behind the prompt, in place of the completion.
    """
    columns, limit = rows.column_names, args.max_length or math.inf
    if "other_input_ids" in columns:
        sides = rows.select_columns(["input_ids", *(["other_input_ids"] if args.with_others else [])])
        lengths = [max(map(len, row.values())) for row in sides]
    else:
        lengths = rows["length"][:] if "length" in columns else list(map(len, rows["input_ids"]))
    if sampled and "prompt_length" in columns:
        reached = (min(limit, length + args.max_new_tokens) for length in rows["prompt_length"])
        lengths = [int(max(pair)) for pair in zip(lengths, reached, strict=True)]
    if "teacher_length" in columns:
        lengths = list(map(max, lengths, rows["teacher_length"]))
    multiple = args.pad_to_multiple_of or 1
    return [-(-length // multiple) * multiple for length in lengths]


def copies_of_row(args: Any) -> int:
    """Count the sequences that a batch has of one row of the data, at the most."""
    return args.sequences_of_row * getattr(args, "num_generations", 1)


def check_longest(rows: Any, args: Any, *, sampled: bool) -> None:
    """Refuse a row that is longer than a batch may be: it would be cut, or take more memory than was asked for.

    Args:
        sampled: as of `row_tokens`.

    Raises:
        ConfigurationError: with the least number of tokens.
    """
    if args.per_device_train_tokens is None or not isinstance(rows, Dataset):
        return
    longest, copies = max(row_tokens(rows, args, sampled=sampled), default=0), copies_of_row(args)
    if copies * longest <= args.per_device_train_tokens:
        return
    with_answer = f", with up to max_new_tokens={args.max_new_tokens} sampled ones" if sampled else ""
    times = f" in each of the {copies} sequences that a batch has of it" if copies > 1 else ""
    raise ConfigurationError(
        f"Got `{NAME}: {args.per_device_train_tokens}`, but the longest row of dataset 'train' has {longest} tokens"
        f"{with_answer}{times}; expected at least {copies * longest}, as no row is cut to fit. Raise it, or lower "
        "`max_length`, which cuts rows."
    )


def token_batches(lengths: list[int], args: Any, processes: int) -> TokenBatches:
    """Plan an epoch's batches of rows of such lengths (see `row_tokens`), none longer than `check_longest` admits."""
    budget = args.per_device_train_tokens // copies_of_row(args)
    return TokenBatches(lengths, budget, processes, args.gradient_accumulation_steps)


def rows_of_batch(args: Any, length: int) -> int:
    """Count the rows of a batch whose rows are so long."""
    if args.per_device_train_tokens is None:
        return args.per_device_train_batch_size
    return max(1, args.per_device_train_tokens // (args.sequences_of_row * max(1, length)))
