"""Formatted, lazy and foreign datasets train the rows that a plain dataset trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils import data as torch_data

from distill_trainers.data.pairs import prepare_pairs
from distill_trainers.data.plain import plain_dataset
from distill_trainers.data.tokenization import prepare_dataset
from distill_trainers.evaluation import EvaluationSettings
from distill_trainers.evaluation.examples import read_examples
from distill_trainers.exceptions import DatasetError

FORMATS = ["torch", "numpy", "pandas", "arrow", "python"]
TOKENS = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
TEXTS = [{"prompt": "ab", "completion": "c"}, {"prompt": "d", "completion": "efg"}]
TURNS = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": a}]} for a in "xy"]
LAYOUTS = {"tokens": TOKENS, "texts": TEXTS, "turns": TURNS}


class MapStyle(torch_data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {
            name: torch.tensor(value) if isinstance(value, list) and isinstance(value[0], int) else value
            for name, value in self.rows[index].items()
        }


class Stream(torch_data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(MapStyle(self.rows)[i] for i in range(len(self.rows)))


def as_arrays(rows):
    return [{k: np.array(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]


SHAPES = {
    **{name: (lambda rows, name=name: Dataset.from_list(rows).with_format(name)) for name in FORMATS},
    **{
        f"stream, {name}": (lambda rows, name=name: Dataset.from_list(rows).to_iterable_dataset().with_format(name))
        for name in FORMATS[:4]
    },
    "list": list,
    "tuple of arrays": lambda rows: tuple(as_arrays(rows)),
    "torch": MapStyle,
    "torch, part of it": lambda rows: torch_data.Subset(MapStyle([rows[0], *rows]), [0, 2]),
    "torch, iterable": Stream,
    "generator of tensors": lambda rows: IterableDataset.from_generator(Stream(rows).__iter__),
    "transform": lambda rows: Dataset.from_dict({"number": [0, 1]}).with_transform(
        lambda batch: {name: [rows[i][name] for i in batch["number"]] for name in rows[0]}
    ),
    "transform to tensors": lambda rows: Dataset.from_dict({"number": [0, 1]}).with_transform(
        lambda batch: {name: [MapStyle(rows)[i][name] for i in batch["number"]] for name in rows[0]}
    ),
}


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_rows_are_trained(tokenizer, shape, rows):
    right = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=64).to_list()
    prepared = prepare_dataset(SHAPES[shape](rows), tokenizer, max_length=64)
    assert list(prepared) == right and len(right) == 2
    assert all(type(row["input_ids"]) is list for row in prepared)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_pairs_are_trained(tokenizer, shape):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "d"}]
    right = prepare_pairs(Dataset.from_list(rows), tokenizer, max_length=64).to_list()
    assert list(prepare_pairs(SHAPES[shape](rows), tokenizer, max_length=64)) == right


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_rows_are_evaluated(tokenizer, shape):
    for rows in (TOKENS, TEXTS):
        right = read_examples(rows, tokenizer, EvaluationSettings())
        assert read_examples(SHAPES[shape](rows), tokenizer, EvaluationSettings()) == right and len(right) == 2


def test_columns_that_a_format_hides_are_not_read(tokenizer):
    rows = Dataset.from_list([{**row, "input_ids": [1, 2]} for row in TEXTS])
    shown = rows.with_format("torch", columns=["prompt", "completion"])
    right = prepare_dataset(Dataset.from_list(TEXTS), tokenizer, max_length=64).to_list()
    assert prepare_dataset(shown, tokenizer, max_length=64).to_list() == right
    both = rows.with_format("torch", columns=["prompt"], output_all_columns=True)
    assert sorted(plain_dataset(both).column_names) == ["completion", "input_ids", "prompt"]


def test_columns_are_renamed_as_a_transform_names_them(tokenizer):
    rows = Dataset.from_dict({"number": [0, 1]}).with_transform(
        lambda batch: {
            "question": [TEXTS[i]["prompt"] for i in batch["number"]],
            "answer": ["x"] * len(batch["number"]),
        }
    )
    mapping = {"question": "prompt", "answer": "completion"}
    prepared = prepare_dataset(rows, tokenizer, max_length=64, column_mapping=mapping)
    assert [tokenizer.decode(row["input_ids"]) for row in prepared] == ["abx<|im_end|>", "dx<|im_end|>"]


def test_many_rows_of_torch_are_read_in_order():
    rows = plain_dataset(MapStyle([{"input_ids": [i]} for i in range(2100)]))
    assert [row["input_ids"] for row in rows] == [[i] for i in range(2100)]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (["ab", "c"], "Row 0 of dataset 'mine' is a str; expected a dictionary of columns"),
        (torch_data.TensorDataset(torch.zeros(2, 3)), "Row 0 of dataset 'mine' is a tuple"),
        ([{"prompt": "a"}, {"prompt": 5}], "do not have the same columns and kinds"),
        ({"prompt": ["a"]}, "is a dict, expected .*from_dict"),
        ("data.jsonl", "is a str, expected"),
        (5, "is a int, expected"),
        (DatasetDict(train=Dataset.from_list(TEXTS)), r"splits \['train'\]"),
        ([], "'mine' is empty"),
    ],
)
def test_what_holds_no_rows_is_refused(tokenizer, dataset, message):
    with pytest.raises(DatasetError, match=message):
        prepare_dataset(dataset, tokenizer, max_length=8, name="mine")
