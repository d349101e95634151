"""Rows of any layout to token ids with a loss mask, cut to length, and whole datasets of them.

A tokenised row has `input_ids` and `loss_mask` (same length; 1 = trained, index 0 has no prediction and never counts)
and `prompt_length`: a rollout starts from `input_ids[:prompt_length]`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill_trainers.data.chat import Chat, assistant_mask, split_conversation, training_template
from distill_trainers.data.formats import (
    DatasetType,
    Message,
    apply_column_mapping,
    as_messages,
    as_text,
    detect_dataset_type,
    first_row,
    is_conversation,
)
from distill_trainers.exceptions import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Needs = Literal["completion", "prompt", "either", "both"]
TokenizedRow = dict[str, Any]

_EMPTY_COMPLETION = "empty completion"
_UNTRAINED = "no trained token (none marked, or all lost to truncation)"
_EMPTY_PROMPT = "empty prompt"


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset_type: DatasetType,
    assistant_only_loss: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenizedRow:
    """One row as `{"input_ids", "loss_mask", "prompt_length"}`.

    Prompt and completion are tokenised apart, so that the prompt of a rollout is the training prompt, token for token.
    A row without a completion (or with an empty one) becomes a prompt: `prompt_length == len(input_ids)`.

    Args:
        row: may bring its own `tools` and `chat_template_kwargs` where it is a conversation.
        dataset_type: as `detect_dataset_type` names it.
        assistant_only_loss: train every assistant turn of `messages`, not the last alone.
        chat_template_kwargs: settings for the chat template; those of the row come first.

    Raises:
        DatasetError: a value of the wrong kind, or a conversation that the chat template cannot split.
    """
    if dataset_type == "tokenized":
        return _from_tokens(row)
    if dataset_type == "text":
        return _from_text(as_text(row["text"], column="text"), tokenizer)
    if dataset_type == "prompt" and not is_conversation(row["prompt"]):
        return _joined(_prompt_ids(as_text(row["prompt"], column="prompt"), tokenizer), [])
    if dataset_type == "prompt_completion" and not (
        is_conversation(row["prompt"]) or is_conversation(row["completion"])
    ):
        return _from_strings(row, tokenizer)
    template = training_template(tokenizer) if assistant_only_loss else None
    chat = Chat(tokenizer, template, _template_settings(row, chat_template_kwargs))
    if dataset_type == "prompt":
        return _from_prompt(as_messages(row["prompt"], role="user"), chat)
    if dataset_type == "prompt_completion":
        prompt = as_messages(row["prompt"], role="user")
        return _from_turns(prompt, as_messages(row["completion"], role="assistant"), chat)
    messages = as_messages(row.get("messages") or row.get("conversations"), role="user")
    return _from_messages(messages, chat, assistant_only_loss=assistant_only_loss)


def truncate(
    row: TokenizedRow, max_length: int | None, reserve: int = 0, *, bos_token_id: int | None = None
) -> TokenizedRow:
    """Cuts a tokenised row to `max_length` tokens.

    The prompt loses its beginning, until what follows it has `min(len(completion), max_length // 2)` tokens, or
    `reserve` if that is more; then the completion loses its end (and with it its EOS: the text did not end there).
    A completion is never removed whole. A leading BOS stays where it is.

    Args:
        max_length: tokens in all; None leaves the row as it is.
        reserve: tokens kept free behind the prompt for a rollout (`max_new_tokens`).
        bos_token_id: the id that has to stay in front, if the prompt begins with it.
    """
    if max_length is None:
        return row
    ids, mask, prompt_length = row["input_ids"], row["loss_mask"], row["prompt_length"]
    completion_length = len(ids) - prompt_length
    room = max(min(completion_length, max(1, max_length // 2)), reserve)
    lost = max(0, prompt_length - (max_length - room))
    if lost == 0 and len(ids) <= max_length:
        return row
    first = int(prompt_length > lost > 0 and ids[0] == bos_token_id)
    kept = [*range(first), *range(lost + first, len(ids))][:max_length]
    return {
        "input_ids": [ids[i] for i in kept],
        "loss_mask": [mask[i] for i in kept],
        "prompt_length": prompt_length - lost,
    }


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
) -> Dataset | IterableDataset:
    """A dataset of any layout as tokenised rows, with their `length` for batches of like-sized rows.

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

    Raises:
        DatasetError: no rows, an unknown layout, rows that cannot be tokenised, or none left to train on.
        ConfigurationError: `max_length` leaves no room for a prompt.
    """
    _check_lengths(max_length, max_new_tokens)
    _check_is_dataset(dataset, name)
    dataset = apply_column_mapping(dataset, column_mapping, name=name)
    row = first_row(dataset, name=name)
    dataset_type = detect_dataset_type(row, name=name)
    _check_type_serves(dataset_type, needs, assistant_only_loss, name)
    if tokenizer.eos_token_id is None:
        logger.warning("The tokenizer has no EOS token: a student trained on %r may not learn to stop.", name)
    work = partial(
        _prepare_row,
        tokenizer=tokenizer,
        dataset_type=dataset_type,
        assistant_only_loss=assistant_only_loss,
        chat_template_kwargs=chat_template_kwargs,
        max_length=max_length,
        reserve=max_new_tokens or 0,
        needs=needs,
        strict=strict,
        name=name,
        code=_code_fingerprint(),
    )
    how: dict[str, Any] = {"with_indices": True, "remove_columns": list(row), "features": _features()}
    if hasattr(dataset, "num_rows"):
        prepared = dataset.map(work, num_proc=num_proc, desc=f"Tokenizing {name}", **how)
        prepared = _drop(prepared, max_length, name)
    else:
        prepared = dataset.map(work, **how).filter(_is_kept)
    return prepared.remove_columns(["dropped", "prompt_cut", "completion_cut"])


# One layout each ---------------------------------------------------------------------------------------------------


def _from_text(text: str, tokenizer: PreTrainedTokenizerBase) -> TokenizedRow:
    if not text.strip():
        return _joined([], [])
    return _joined([], _with_eos(tokenizer(text)["input_ids"], tokenizer))


def _from_strings(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenizedRow:
    prompt = _prompt_ids(as_text(row["prompt"], column="prompt"), tokenizer)
    completion = as_text(row["completion"], column="completion")
    if not completion.strip():
        return _joined(prompt, [])
    return _joined(prompt, _with_eos(tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer))


def _from_prompt(messages: list[Message], chat: Chat) -> TokenizedRow:
    text = chat.begun_turn(messages) if messages[-1]["role"] == "assistant" else chat.prompt(messages)
    return _joined(chat.ids(text), [])


def _from_turns(prompt: list[Message], completion: list[Message], chat: Chat) -> TokenizedRow:
    if not prompt:
        # No template renders a header of nothing, so there is no prompt and nothing that could be told from it.
        return _joined([], [])
    if all(_is_silent(message) for message in completion):
        return _joined(chat.ids(chat.prompt(prompt)), [])
    prompt_ids, completion_ids = split_conversation(chat, prompt, completion)
    row = _joined(prompt_ids, completion_ids)
    if any(message["role"] != "assistant" for message in completion):
        # What a tool or a user says inside the completion is context: the student must not learn to write it.
        mask = assistant_mask(chat, [*prompt, *completion], row["input_ids"], generation_prompt=False)
        row["loss_mask"] = [0] * len(prompt_ids) + mask[len(prompt_ids) :]
    return row


def _from_messages(messages: list[Message], chat: Chat, *, assistant_only_loss: bool) -> TokenizedRow:
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not messages:
        return _joined([], [])
    if not turns:
        return _from_prompt(messages, chat)
    prompt, completion = messages[: turns[-1]], messages[turns[-1] : turns[-1] + 1]
    row = _from_turns(prompt, completion, chat)
    if assistant_only_loss and len(turns) > 1:
        prompt_ids = row["input_ids"][: row["prompt_length"]]
        history = assistant_mask(chat, prompt, prompt_ids, generation_prompt=True)
        row["loss_mask"] = history + row["loss_mask"][len(history) :]
    return row


def _from_tokens(row: Mapping[str, Any]) -> TokenizedRow:
    ids, mask = list(row["input_ids"]), _given_mask(row)
    if len(mask) != len(ids):
        raise DatasetError(f"The row has {len(ids)} input_ids but {len(mask)} mask values. Both need the same length.")
    prompt_length = row.get("prompt_length")
    if prompt_length is None:
        # As with messages: the prompt ends where the last trained stretch begins.
        end = max((i + 1 for i, trained in enumerate(mask) if trained), default=len(ids))
        prompt_length = max((i + 1 for i in range(end) if not mask[i]), default=0) if any(mask) else len(ids)
    if not 0 <= prompt_length <= len(ids):
        raise DatasetError(f"prompt_length is {prompt_length}, but the row has {len(ids)} input_ids.")
    padding = row.get("attention_mask") or [1] * len(ids)
    real = [i for i in range(len(ids)) if padding[i]]
    return {
        "input_ids": [ids[i] for i in real],
        "loss_mask": [mask[i] for i in real],
        "prompt_length": sum(1 for i in real if i < prompt_length),
    }


def _given_mask(row: Mapping[str, Any]) -> list[int]:
    for column in ("loss_mask", "completion_mask"):
        if row.get(column) is not None:
            return [int(bool(value)) for value in row[column]]
    if row.get("labels") is None:
        return [1] * len(row["input_ids"])
    labels = row["labels"]
    if any(label not in (-100, token) for label, token in zip(labels, row["input_ids"], strict=False)):
        raise DatasetError(
            "The labels differ from input_ids where they are not -100. Expected unshifted labels, as transformers has "
            "them: input_ids with -100 at every position that is not trained."
        )
    return [int(label != -100) for label in labels]


# Small parts -------------------------------------------------------------------------------------------------------


def _joined(prompt_ids: list[int], completion_ids: list[int]) -> TokenizedRow:
    return {
        "input_ids": [*prompt_ids, *completion_ids],
        "loss_mask": [0] * len(prompt_ids) + [1] * len(completion_ids),
        "prompt_length": len(prompt_ids),
    }


def _prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    eos = tokenizer.eos_token_id
    # Some tokenizers end everything with EOS: a prompt is not at its end. (A BOS that is the EOS, as in GPT-2, stays.)
    if len(ids) > 1 and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        return ids[:-1]
    return ids


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _is_silent(message: Message) -> bool:
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else content
    return not said and not message.get("tool_calls") and not message.get("reasoning_content")


def _template_settings(row: Mapping[str, Any], settings: Mapping[str, Any] | None) -> dict[str, Any]:
    own = row.get("chat_template_kwargs") or {}
    merged = {**(settings or {}), **{key: value for key, value in own.items() if value is not None}}
    tools = row.get("tools")
    if tools:
        merged["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    return merged


# Whole datasets ----------------------------------------------------------------------------------------------------


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
    **how: Any,
) -> dict[str, Any]:
    try:
        whole = tokenize_row(row, tokenizer, **how)
    except DatasetError as error:
        raise DatasetError(f"Row {index} of dataset {name!r}: {error}") from error
    cut = truncate(whole, max_length, reserve, bos_token_id=tokenizer.bos_token_id)
    dropped = _reason_to_drop(cut, needs)
    if strict and dropped == _EMPTY_COMPLETION:
        raise DatasetError(f"Row {index} of dataset {name!r} has an empty completion. Remove it, or set strict=False.")
    completion_length = len(whole["input_ids"]) - whole["prompt_length"]
    return {
        **cut,
        "length": len(cut["input_ids"]),
        "dropped": dropped,
        "prompt_cut": cut["prompt_length"] < whole["prompt_length"],
        "completion_cut": len(cut["input_ids"]) - cut["prompt_length"] < completion_length,
    }


def _reason_to_drop(row: TokenizedRow, needs: Needs) -> str:
    has_prompt = row["prompt_length"] > 0
    trains = any(row["loss_mask"][1:])
    untrained = _EMPTY_COMPLETION if row["prompt_length"] == len(row["input_ids"]) else _UNTRAINED
    if needs == "either":
        return "" if has_prompt or trains else untrained
    if needs in ("prompt", "both") and not has_prompt:
        return _EMPTY_PROMPT
    return untrained if needs in ("completion", "both") and not trains else ""


def _is_kept(row: Mapping[str, Any]) -> bool:
    return not row["dropped"]


def _drop(dataset: Dataset, max_length: int | None, name: str) -> Dataset:
    flags = dataset.select_columns(["dropped", "prompt_cut", "completion_cut"])[:]
    reasons = Counter(reason for reason in flags["dropped"] if reason)
    kept = [i for i, reason in enumerate(flags["dropped"]) if not reason]
    parts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    if not kept:
        raise DatasetError(
            f"None of the {len(dataset)} rows of dataset {name!r} can be trained on: {parts} (row 0: "
            f"{flags['dropped'][0]}). Check the columns (column_mapping), and max_length={max_length}."
        )
    news = []
    if reasons:
        first = next(i for i, reason in enumerate(flags["dropped"]) if reason)
        news.append(f"{len(dataset) - len(kept)} rows dropped ({parts}; the first is row {first})")
    cut_prompts = sum(flags["prompt_cut"][i] for i in kept)
    cut_completions = sum(flags["completion_cut"][i] for i in kept)
    if cut_prompts or cut_completions:
        news.append(
            f"max_length={max_length} cut the beginning of {cut_prompts} prompts and the end of "
            f"{cut_completions} completions"
        )
    if news:
        logger.warning("Dataset %r, %d rows: %s.", name, len(dataset), "; ".join(news))
    return dataset.select(kept) if reasons else dataset


def _features() -> Features:
    from datasets import Features, List, Value

    flag = Value("bool")
    return Features(
        {
            "input_ids": List(Value("int32")),
            "loss_mask": List(Value("int8")),
            "prompt_length": Value("int32"),
            "length": Value("int32"),
            "dropped": Value("string"),
            "prompt_cut": flag,
            "completion_cut": flag,
        }
    )


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


def _check_is_dataset(dataset: Any, name: str) -> None:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise DatasetError(f"Dataset {name!r} is a dictionary of splits {sorted(dataset)}. Pass one of them.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise DatasetError(
            f"Dataset {name!r} is a {type(dataset).__name__}, expected datasets.Dataset or datasets.IterableDataset. "
            "A list of dictionaries becomes one with datasets.Dataset.from_list."
        )


def _check_type_serves(dataset_type: DatasetType, needs: Needs, assistant_only_loss: bool, name: str) -> None:
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
            f"assistant_only_loss needs conversations, but dataset {name!r} is plain text. Set it to false, or give messages."
        )


@cache
def _code_fingerprint() -> str:
    # datasets caches results of `map` under the arguments of the function, but not its code: a new release of this
    # package must not read rows that an older one tokenised.
    here = Path(__file__).parent
    code = b"".join((here / file).read_bytes() for file in ("formats.py", "chat.py", "tokenization.py"))
    return hashlib.sha256(code).hexdigest()
