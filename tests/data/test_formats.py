"""Layouts: what is recognised, what is refused, and with which advice."""

import pytest
from datasets import Dataset, IterableDataset

from distill_trainers.data.formats import apply_column_mapping, as_messages, detect_dataset_type, to_chatml
from distill_trainers.exceptions import DatasetError

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"input_ids": [1], "labels": [1]}, "tokenized"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"prompt": "q", "completion": "a", "rejected": "b", "chosen": "a"}, "prompt_completion"),
        ({"messages": [USER]}, "messages"),
        ({"prompt": "q", "messages": [USER]}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}], "id": 3}, "messages"),
        ({"prompt": [USER]}, "prompt"),
        ({"text": "once"}, "text"),
    ],
)
def test_types_are_recognised(row, expected):
    assert detect_dataset_type(row) == expected


def test_unknown_columns_are_named_with_the_layouts_and_the_remedy():
    with pytest.raises(DatasetError, match=r"'answer', 'question'") as caught:
        detect_dataset_type({"question": "q", "answer": "a"}, name="gsm8k")
    for part in ("gsm8k", "column_mapping", "rename_columns", "messages", "prompt + completion"):
        assert part in str(caught.value)


def test_preferences_are_sent_to_their_method():
    with pytest.raises(DatasetError, match="DPKD.*'chosen': 'completion'"):
        detect_dataset_type({"prompt": "q", "chosen": "a", "rejected": "b"})


def test_sharegpt_becomes_chatml_without_changing_the_row():
    given = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
        {"from": "observation", "value": "o"},
    ]
    assert to_chatml(given) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "o"},
    ]
    assert given[1] == {"from": "human", "value": "q"}


def test_a_message_without_a_role_is_refused():
    with pytest.raises(DatasetError, match="has no role"):
        to_chatml([{"speaker": "x", "content": "y"}])


def test_strings_become_messages_and_numbers_do_not():
    assert as_messages("hi", role="user") == [USER]
    assert as_messages(None, role="user") == as_messages([], role="user") == []
    with pytest.raises(DatasetError, match="got int: 7"):
        as_messages(7, role="user")


@pytest.mark.parametrize("stream", [False, True])
def test_mapping_renames(stream):
    dataset = Dataset.from_dict({"question": ["q"], "answer": ["a"], "id": [1]})
    dataset = dataset.to_iterable_dataset() if stream else dataset
    renamed = apply_column_mapping(dataset, {"question": "prompt", "answer": "completion", "id": "id"})
    assert next(iter(renamed)) == {"prompt": "q", "completion": "a", "id": 1}


def test_mapping_of_a_stream_without_known_columns():
    stream = IterableDataset.from_generator(lambda: iter([{"question": "q"}]))
    assert next(iter(apply_column_mapping(stream, {"question": "prompt"}))) == {"prompt": "q"}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"questoin": "prompt"}, r"\['questoin'\].*'answer', 'question'"),
        ({"prompt": "question"}, "turned round"),
        ({"question": "answer"}, r"\['answer'\] twice"),
        ({"question": "prompt", "answer": "prompt"}, r"\['prompt'\] twice"),
    ],
)
def test_bad_mappings_are_refused(mapping, message):
    dataset = Dataset.from_dict({"question": ["q"], "answer": ["a"]})
    with pytest.raises(DatasetError, match=message):
        apply_column_mapping(dataset, mapping)
