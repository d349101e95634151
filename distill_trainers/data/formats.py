"""Dataset layouts: which columns make which type of dataset, and how rows of each are brought into one shape."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from distill_trainers.data.messages import Message, as_json, read_message
from distill_trainers.exceptions import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

DatasetType = Literal["tokenized", "preference", "prompt_completion", "messages", "prompt", "text", "rationale"]

LAYOUTS: dict[str, str] = {
    "tokenized": "input_ids, optionally loss_mask, completion_mask, assistant_masks or labels (-100 = not trained)",
    "prompt_completion": "prompt + completion (both strings, or both lists of messages)",
    "messages": "messages (list of {role, content}) or conversations (ShareGPT: list of {from, value})",
    "prompt": "prompt alone (string or list of messages), for on-policy training",
    "text": "text (string), every token trained",
    "rationale": "question + answer + rationale, optionally choices, wrong_rationale and task, for method rationale",
}

# As JSON, Python and numpy write it, and so a CSV file.
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*(?P<q>['"])(?:role|content|from|value)(?P=q)\s*:""")

# ShareGPT and its relatives name the speakers differently from the roles that chat templates know.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",  # OpenAI's, before it spoke of tools
}


def detect_dataset_type(row: Mapping[str, Any], *, name: str = "train") -> DatasetType:
    """Tell the type of a dataset from the columns of one of its rows.

    `prompt` + `completion` wins over `messages`, which wins over `prompt` alone (chat datasets often carry their
    first question in a `prompt` column besides the whole conversation).

    Raises:
        DatasetError: no layout fits, or the rows are preference pairs, which distillation on completions cannot use.
    """
    if "input_ids" in row:
        return "tokenized"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "chosen" in row and "rejected" in row:
        raise DatasetError(
            f"Dataset {name!r} holds preference pairs (columns {sorted(row)}), but this trainer learns from one "
            "completion per prompt. Train on pairs with a preference method (DPKD), or keep the preferred side with "
            "column_mapping={'chosen': 'completion'}."
        )
    if "messages" in row or "conversations" in row:
        return "messages"
    if "prompt" in row:
        return "prompt"
    if "text" in row:
        return "text"
    if {"question", "answer", "rationale"} <= row.keys():
        return "rationale"
    layouts = "\n".join(f"  - {text}" for text in LAYOUTS.values())
    raise DatasetError(
        f"Dataset {name!r} has the columns {sorted(row)}, which fit none of the accepted layouts:\n{layouts}\n"
        "Rename its columns with column_mapping, a table from the dataset's names to these, for example "
        "{question: prompt, answer: completion} (in Python: dataset.rename_columns)."
    )


_COLUMNS: dict[str, tuple[str, ...]] = {
    "tokenized": ("input_ids",),
    "prompt_completion": ("prompt", "completion"),
    "prompt": ("prompt",),
    "text": ("text",),
}


def check_columns(row: Mapping[str, Any], dataset_type: DatasetType) -> None:
    """Refuse a row without the columns of its dataset's layout, which is that of the first row.

    Raises:
        DatasetError: which are missing.
    """
    missing = [column for column in _COLUMNS.get(dataset_type, ()) if column not in row]
    if missing:
        raise DatasetError(
            f"The row has the columns {sorted(row)}, and lacks {missing}, which the first row has. All rows need the "
            "same layout: mend the row, or split the dataset by layout."
        )


def is_conversation(value: Any) -> bool:
    """Tell whether a column value is a non-empty list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def to_chatml(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Convert messages to what chat templates read (see `read_message`); the input stays as it was.

    Accepts ShareGPT's {from, value} and its speakers (human, gpt, observation, function_call).

    Raises:
        DatasetError: a message that has no role, or something in it that no text stands for.
    """
    from trl.data_utils import maybe_convert_to_chatml

    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DatasetError(
                f"Message {number} is of type {type(message).__name__} ({message!r:.80}), expected a mapping "
                "{role, content}. Mend the row."
            )
    # TRL renames the keys in place, hence the copies.
    converted = maybe_convert_to_chatml({"messages": [dict(message) for message in messages]})["messages"]
    for message in converted:
        role = message.get("role")
        if not role or not isinstance(role, str):
            raise DatasetError(
                f"A message with the keys {sorted(message)} has no role. Expected {{role, content}} or {{from, value}}."
            )
        message["role"] = _ROLES.get(role, role)
    return [read_message(message, number) for number, message in enumerate(converted)]


def conversation_of(row: Mapping[str, Any]) -> list[Message]:
    """Read the conversation of a row of the layout `messages`, which may be the JSON text of a list.

    Raises:
        DatasetError: something else.
    """
    column = "messages" if row.get("messages") else "conversations"
    value = as_json(row.get(column) or [], f"Column {column!r}", "a list of messages, or its JSON text")
    if not isinstance(value, list):
        raise DatasetError(
            f"Column {column!r} holds {type(value).__name__} ({value!r:.80}), expected a list of messages "
            "{role, content}. Convert it with dataset.map."
        )
    return to_chatml(value)


def goes_on(row: Mapping[str, Any]) -> bool:
    """Tell whether a row of the layout `messages` has turns after its last answer."""
    messages = as_json(row.get("messages") or row.get("conversations"), "The conversation", "a list of messages")
    if not isinstance(messages, list):
        return False
    roles = [str(message.get("role") or message.get("from")) for message in messages if isinstance(message, Mapping)]
    answered = [_ROLES.get(role, role) == "assistant" for role in roles]
    return any(answered) and not answered[-1]


def as_messages(value: Any, *, role: str) -> list[Message]:
    """Read a column value as messages: a conversation is converted, a string becomes one message of `role`."""
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": as_text(value, column="prompt" if role == "user" else "completion")}]
    if is_conversation(value):
        return to_chatml(value)
    raise DatasetError(
        f"Expected a string or a list of messages ({{role, content}}), got {type(value).__name__}: {value!r:.80}."
    )


def as_text(value: Any, *, column: str) -> str:
    """Read a column value as text; a missing value is the empty string.

    Raises:
        DatasetError: the value is something else (a number, a list, …).
    """
    if value is None or value == []:
        return ""
    if isinstance(value, str):
        if column != "text" and _MESSAGES_AS_TEXT.match(value):
            raise DatasetError(
                f"Column {column!r} holds the text of a list of messages ({value!r:.80}), which would be trained as "
                "text. Give lists of {role, content} (in Python: json.loads), as a .jsonl or .parquet file has them."
            )
        return value
    raise DatasetError(
        f"Column {column!r} holds {type(value).__name__} ({value!r:.80}), expected a string"
        + (" or a list of messages. " if column != "text" else ". ")
        + "Convert it with dataset.map, or name another column in column_mapping."
    )


@contextlib.contextmanager
def reading(told: str, *, more: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Read, within it, rows of files: what libraries say about damaged ones is told as an error of the data.

    Args:
        told: begins the error.
        more: errors that can have no other reason here.

    Raises:
        DatasetError: with what the library says.
    """
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        yield
    except (DatasetError, ConfigurationError):
        raise
    except (ArrowException, DatasetsError, EOFError, OSError, UnicodeError, *more) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # of what is written meanwhile
            raise
        cause = error.__cause__ or error
        said = " ".join(str(cause).split()).rstrip(".")
        raise DatasetError(
            f"{told}: {type(cause).__name__}: {said}. Expected whole files, text in UTF-8: look whether they were "
            "cut or damaged, and make or fetch them again."
        ) from error


def first_row(dataset: Dataset | IterableDataset, *, name: str = "train") -> dict[str, Any]:
    """Return the first row; of a stream it is read without using it up.

    Raises:
        DatasetError: there is none.
    """
    with reading(f"Dataset {name!r} cannot be read", more=(ValueError,)):
        for row in dataset:
            return row
    raise DatasetError(f"Dataset {name!r} is empty: there is no row to train on. Check its path, split and filters.")


def apply_column_mapping(
    dataset: Dataset | IterableDataset, mapping: Mapping[str, str] | None, *, name: str = "train"
) -> Dataset | IterableDataset:
    """Rename columns: `mapping` goes from the dataset's names to those of a layout, e.g. {question: prompt}.

    Raises:
        DatasetError: a column to rename is missing, or a new name is taken or given twice.
    """
    if not mapping:
        return dataset
    columns = dataset.column_names or list(first_row(dataset, name=name))
    missing = [column for column in mapping if column not in columns]
    if missing:
        hint = ""
        if set(mapping.values()) <= set(columns):
            hint = " It looks turned round: write {dataset column: layout column}."
        raise DatasetError(
            f"column_mapping names columns that dataset {name!r} does not have: {missing}. Its columns are "
            f"{sorted(columns)}.{hint}"
        )
    targets = list(mapping.values())
    untouched = set(columns) - set(mapping)
    clashes = sorted({target for target in targets if target in untouched or targets.count(target) > 1})
    if clashes:
        raise DatasetError(
            f"column_mapping would give dataset {name!r} the columns {clashes} twice. Rename or remove the present "
            "ones first (dataset.remove_columns)."
        )
    return dataset.rename_columns({old: new for old, new in mapping.items() if old != new})
