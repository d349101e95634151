"""One row of any layout to token ids with labels, and its cut to length.

A tokenised row has `input_ids` and `labels` (same length; -100 = not trained, and index 0 has no prediction and never
counts) and `prompt_length`: a rollout starts from `input_ids[:prompt_length]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill_trainers.data.arrow import class_names, without_filling
from distill_trainers.data.conversations import tokenize_conversation, turns_of
from distill_trainers.data.feedback import FeedbackRows
from distill_trainers.data.formats import DatasetType, as_text, check_columns, is_conversation
from distill_trainers.data.labels import IGNORED, TokenizedRow, row_of
from distill_trainers.data.messages import Message
from distill_trainers.data.reward_rows import REWARD_ROW, RewardRows
from distill_trainers.data.teacher_prompts import TeacherPrompts
from distill_trainers.data.texts import ended, num_ids, split_text, text_ids
from distill_trainers.data.views import kept_view
from distill_trainers.exceptions import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset_type: DatasetType,
    assistant_only_loss: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    answer_last: bool = False,
    features: Mapping[str, Any] | None = None,
    teacher_prompts: TeacherPrompts | None = None,
    feedback: FeedbackRows | None = None,
    rewards: RewardRows | None = None,
    reserve: int = 0,
    begin: list[int] | None = None,
) -> TokenizedRow:
    """Tokenise one row as `{"input_ids", "labels", "prompt_length"}`.

    Prompt and completion given as strings are tokenised as one text; the prompt of a rollout is the training prompt,
    token for token. Where a token straddles their border, it belongs to the completion, and `straddled` says how many
    tokens of the prompt alone are not there. A row without a completion (or with an empty one) becomes a prompt:
    `prompt_length == len(input_ids)`.

    Args:
        row: may bring its own `tools` and `chat_template_kwargs` where it is a conversation.
        dataset_type: as `detect_dataset_type` names it.
        assistant_only_loss: train every assistant turn of `messages`, not the last alone.
        chat_template_kwargs: settings for the chat template; those of the row come first.
        answer_last: `messages` that end with another role than the assistant's are a prompt, though they hold answers.
        features: of the dataset, to tell keys that it added to messages and tools from the user's own nulls.
        teacher_prompts: write the prompt that the teacher reads; the row then has a view (see `views.py`).
        feedback: add what the teacher's prompt is made of once the student has answered (see `feedback.py`).
        rewards: add what reward functions read of the row (see `reward_rows.py`).
        reserve: tokens that the student may write.
        begin: what `special_beginning` returns, where many rows are tokenised.

    Raises:
        DatasetError: a value of the wrong kind, or a conversation that the chat template cannot split.
    """
    row = without_filling(row, features)
    check_columns(row, dataset_type)
    asked: str | list[Message] | None = None
    if dataset_type == "tokenized":
        tokens = _from_tokens(row, tokenizer)
    elif is_text(row, dataset_type):
        asked = as_text(row.get("prompt"), column="prompt")
        tokens = _from_text(row, dataset_type, tokenizer, begin)
    else:
        asks = teacher_prompts or feedback or rewards
        asked = turns_of(row, dataset_type, answer_last=answer_last)[0] if asks else []
        tokens = tokenize_conversation(
            row,
            tokenizer,
            dataset_type=dataset_type,
            assistant_only_loss=assistant_only_loss,
            chat_template_kwargs=chat_template_kwargs,
            answer_last=answer_last,
        )
    if not tokens["input_ids"]:
        return tokens
    if rewards is not None:
        rewarded: Any = {REWARD_ROW: rewards.written(row, asked)}
        tokens = tokens | rewarded
    row = class_names(row, features)
    if feedback is not None and asked is not None and tokens["prompt_length"]:
        more: Any = feedback.added_to(tokens, row, asked, tokenizer, chat_template_kwargs, reserve)
        return tokens | more
    if teacher_prompts is None:
        return tokens
    return teacher_prompts.added_to(tokens, row, asked, tokenizer, chat_template_kwargs)


def truncate(
    row: TokenizedRow, max_length: int | None, reserve: int = 0, *, bos_token_id: int | None = None
) -> TokenizedRow:
    """Cut a tokenised row to `max_length` tokens.

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
    ids, labels, prompt_length = row["input_ids"], row["labels"], row["prompt_length"]
    completion_length = len(ids) - prompt_length
    room = max(min(completion_length, max(1, max_length // 2)), reserve)
    lost = max(0, prompt_length - (max_length - room))
    if lost == 0 and len(ids) <= max_length:
        return row
    first = int(prompt_length > lost > 0 and ids[0] == bos_token_id)
    places = [*range(first), *range(lost + first, len(ids))][:max_length]
    return {
        "input_ids": [ids[i] for i in places],
        "labels": [labels[i] for i in places],
        "prompt_length": prompt_length - lost,
        **kept_view(row, first, lost + first if lost else 0),
    }


def is_text(row: Mapping[str, Any], dataset_type: DatasetType) -> bool:
    """Tell whether a row is plain text and not a conversation or token ids."""
    if dataset_type == "prompt_completion":
        return not (is_conversation(row["prompt"]) or is_conversation(row["completion"]))
    return dataset_type == "text" or (dataset_type == "prompt" and not is_conversation(row["prompt"]))


def _from_text(
    row: Mapping[str, Any], dataset_type: DatasetType, tokenizer: PreTrainedTokenizerBase, begin: list[int] | None
) -> TokenizedRow:
    if dataset_type == "text":
        text = as_text(row["text"], column="text")
        return row_of([], ended(text_ids(text, tokenizer, begin), tokenizer) if text.strip() else [])
    prompt = as_text(row["prompt"], column="prompt")
    if dataset_type == "prompt":
        return row_of(text_ids(prompt, tokenizer, begin), [])
    completion = as_text(row["completion"], column="completion")
    prompt_ids, completion_ids, lost = split_text(prompt, completion, tokenizer, begin)
    return row_of(prompt_ids, completion_ids) | ({"straddled": lost} if lost else {})


def _from_tokens(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenizedRow:
    if not isinstance(row["input_ids"], list) or not set(map(type, row["input_ids"])) <= {int}:
        raise DatasetError(
            f"Column 'input_ids' holds {type(row['input_ids']).__name__} ({row['input_ids']!r:.80}), expected a list "
            "of whole numbers. Tokenise the row anew, or remove it."
        )
    ids, mask = list(row["input_ids"]), _given_mask(row)
    if len(mask) != len(ids):
        raise DatasetError(f"The row has {len(ids)} input_ids but {len(mask)} mask values. Both need the same length.")
    prompt_length = row.get("prompt_length")
    if prompt_length is None:
        # As with messages: the prompt ends where the last trained stretch begins.
        end = max((i + 1 for i, trained in enumerate(mask) if trained), default=len(ids))
        prompt_length = max((i + 1 for i in range(end) if not mask[i]), default=0) if any(mask) else len(ids)
    if type(prompt_length) is not int or not 0 <= prompt_length <= len(ids):
        raise DatasetError(f"prompt_length is {prompt_length!r}; expected 0 to the {len(ids)} input_ids of the row.")
    padding = row.get("attention_mask")
    padding = _flags("attention_mask", padding) if padding is not None and padding != [] else [1] * len(ids)
    if len(padding) != len(ids):
        raise DatasetError(
            f"The row has {len(ids)} input_ids but an attention_mask of {len(padding)}. Make them equal."
        )
    real = [i for i in range(len(ids)) if padding[i]]
    used, known = [ids[i] for i in real], num_ids(tokenizer)
    if used and not 0 <= min(used) <= max(used) < known:
        raise DatasetError(
            f"The row has ids from {min(used)} to {max(used)}; expected 0 to {known - 1}, those of the student's "
            "tokenizer. Tokenise the data with it, and mark padding by an attention_mask."
        )
    return {
        "input_ids": used,
        "labels": [ids[i] if mask[i] else IGNORED for i in real],
        "prompt_length": sum(1 for i in real if i < prompt_length),
    }


_MASKS = ("loss_mask", "completion_mask", "assistant_masks")


def _given_mask(row: Mapping[str, Any]) -> list[int]:
    """Return 1 where every mask that the row has says that a token is trained, as in TRL."""
    masks = [_flags(name, row[name]) for name in _MASKS if row.get(name) is not None]
    if row.get("labels") is not None:
        masks.append(_mask_of_labels(row))
    if len(set(map(len, masks))) > 1:
        raise DatasetError(f"The row has masks of {sorted(set(map(len, masks)))} values. All need the same length.")
    return [int(all(values)) for values in zip(*masks, strict=True)] if masks else [1] * len(row["input_ids"])


def _flags(name: str, values: Any) -> list[int]:
    if not isinstance(values, list):
        raise DatasetError(f"{name} is {values!r:.80}; expected a list of 0 and 1, one for each of the input_ids.")
    if wrong := [value for value in values if value not in (0, 1)]:
        raise DatasetError(f"{name} has {wrong[0]!r:.80}; expected 0 and 1 alone.")
    return [int(value) for value in values]


def _mask_of_labels(row: Mapping[str, Any]) -> list[int]:
    labels = row["labels"]
    if not isinstance(labels, list):
        raise DatasetError(f"The labels are {labels!r:.80}; expected a list, with -100 where nothing is trained.")
    if any(label not in (-100, token) for label, token in zip(labels, row["input_ids"], strict=False)):
        raise DatasetError(
            "The labels differ from input_ids where they are not -100. Expected unshifted labels, as transformers has "
            "them: input_ids with -100 at every position that is not trained."
        )
    return [int(label != -100) for label in labels]
