"""Datasets of all shapes through a trainer, and streams that end before anything is trained."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils import data as torch_data

from distill_trainers.exceptions import DatasetError
from distill_trainers.toy import addition_dataset, addition_rows


class Rows(torch_data.Dataset):
    """A dataset of torch: tokens as tensors."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {name: torch.tensor(self.rows[index][name]) for name in ("input_ids", "labels")}


@pytest.fixture
def tokens(tokenizer):
    """Rows that a user has tokenised."""

    def ids(row):
        prompt, whole = (tokenizer(row["prompt"] + c)["input_ids"] for c in ("", row["completion"]))
        return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}

    return [ids(row) for row in addition_rows(12)]


@pytest.mark.parametrize("shape", ["list", "torch dataset", "torch format", "transform"])
def test_rows_of_any_shape_give_the_losses_of_a_dataset(make_trainer, by_step, tokens, shape):
    numbers = Dataset.from_dict({"number": range(12)})
    shapes = {
        "list": lambda: tokens,
        "torch dataset": lambda: Rows(tokens),
        "torch format": lambda: Dataset.from_list(tokens).with_format("torch"),
        "transform": lambda: numbers.with_transform(
            lambda batch: {name: [tokens[i][name] for i in batch["number"]] for name in tokens[0]}
        ),
    }
    settings = {"lmbda": 0.0, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    plain = make_trainer(train=Dataset.from_list(tokens), eval_dataset=Dataset.from_list(tokens[:4]), **settings)
    rows = shapes[shape]()
    trainer = make_trainer(train=rows, eval_dataset={"some": tokens[:4], "all": rows}, **settings)
    for run in (plain, trainer):
        run.train()
    assert by_step(trainer) == by_step(plain) and len(by_step(plain)) == 2
    assert by_step(trainer, "eval_some_loss") == by_step(plain, "eval_loss") and by_step(trainer, "eval_all_loss")


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def unusable(count):
    return [{"prompt": "1+2=", "completion": ""}] * count


@pytest.mark.parametrize(
    ("rows", "window", "message"),
    [
        (addition_rows(5), 2, None),  # two batches, the last of one row
        (addition_rows(4), 2, "ended after 1 of the 2 batches of the first optimiser step.*at least 8 rows"),
        (addition_rows(12), 4, "ended after 3 of the 4 batches.*at least 16 rows"),
        ([*unusable(3), *addition_rows(4)], 2, "ended after 1 of the 2"),
        (unusable(3), 1, "ended after 0 of the 1 batches.*at least 4 rows.*column_mapping"),
    ],
)
def test_a_stream_that_ends_within_the_first_step_is_refused(make_trainer, rows, window, message):
    trainer = make_trainer(train=stream(rows), lmbda=0.0, max_steps=3, gradient_accumulation_steps=window)
    if message is None:
        trainer.train()
        assert trainer.state.global_step == 3
        return
    with pytest.raises(DatasetError, match=message):
        trainer.train()


def test_fewer_rows_than_a_batch_that_must_be_whole_are_refused(make_trainer):
    trainer = make_trainer(train=addition_dataset(3), lmbda=0.0, dataloader_drop_last=True)
    with pytest.raises(DatasetError, match="ended after 0 of the 1 batches"):
        trainer.train()


def test_an_evaluation_stream_without_rows_is_refused(make_trainer):
    with pytest.raises(DatasetError, match="'eval' is empty"):
        make_trainer(eval_dataset=stream([]), lmbda=0.0, eval_strategy="steps", eval_steps=1)
    rows = [{"prompt": "", "completion": ""}] * 3
    trainer = make_trainer(eval_dataset=stream(rows), lmbda=0.0, eval_strategy="steps", eval_steps=1)
    with pytest.raises(DatasetError, match="'eval' ended without a row that can be used"):
        trainer.train()
