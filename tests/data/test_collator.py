"""Batches: padding sides, masks by length, and completions replaced without a trace of the padding."""

import pytest
import torch

from distill_trainers.data.collator import DistillCollator, replace_completions, unpadded_prompts
from distill_trainers.exceptions import ConfigurationError

EOS = PAD = 2
ROWS = [
    {"input_ids": [5, 6, 7, 8, EOS], "labels": [-100, -100, 7, 8, EOS], "prompt_length": 2, "length": 5},
    {"input_ids": [9, 3, EOS], "labels": [-100, 3, EOS], "prompt_length": 1, "length": 3},
]


def test_training_tensors_are_padded_on_the_right_and_keep_eos():
    batch = DistillCollator(PAD)(ROWS)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, EOS], [9, 3, EOS, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, EOS], [-100, 3, EOS, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_prompts_are_padded_on_the_left():
    batch = DistillCollator(PAD, with_prompts=True)(ROWS)
    assert batch["prompt_ids"].tolist() == [[5, 6], [PAD, 9]]
    assert batch["prompt_mask"].tolist() == [[1, 1], [0, 1]]
    assert unpadded_prompts(batch) == [[5, 6], [9]]


def test_a_padding_token_within_the_text_is_text():
    row = {"input_ids": [PAD, 5, PAD, 6], "labels": [-100, -100, PAD, 6], "prompt_length": 2}
    batch = DistillCollator(PAD, with_prompts=True)([row])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, PAD, 6]]
    assert unpadded_prompts(batch) == [[PAD, 5]]


def test_text_has_no_prompt():
    row = {"input_ids": [5, 6], "labels": [5, 6], "prompt_length": 0}
    batch = DistillCollator(PAD, with_prompts=True)([row])
    assert batch["prompt_ids"].shape == batch["prompt_mask"].shape == (1, 0)


def test_widths_are_rounded_up():
    batch = DistillCollator(PAD, pad_to_multiple_of=8, with_prompts=True)(ROWS)
    assert {tensor.shape for tensor in batch.values()} == {(2, 8)}
    assert batch["prompt_mask"].sum() == 3 and batch["attention_mask"].sum() == 8


def test_a_missing_padding_token_is_refused():
    with pytest.raises(ConfigurationError, match="tokenizer.pad_token = tokenizer.eos_token"):
        DistillCollator(None)


def test_new_completions_follow_their_prompts_and_are_all_trained():
    batch = DistillCollator(PAD, with_prompts=True)(ROWS)
    new = replace_completions(batch, [[4], [7, 7, EOS]], PAD)
    assert new["input_ids"].tolist() == [[5, 6, 4, PAD], [9, 7, 7, EOS]]
    assert new["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert new["labels"].tolist() == [[-100, -100, 4, -100], [-100, 7, 7, EOS]]
    assert new["prompt_ids"] is batch["prompt_ids"]
    assert batch["input_ids"].shape == (2, 5), "the given batch is left as it was"


@pytest.mark.parametrize("multiple", [None, 4, 16])
def test_new_batches_do_not_depend_on_the_padding_of_the_old(multiple):
    longer = {"input_ids": list(range(10, 30)), "labels": [-100] * 19 + [29], "prompt_length": 19}
    alone = DistillCollator(PAD, with_prompts=True)([ROWS[1]])
    among = DistillCollator(PAD + 1, multiple, with_prompts=True)([longer, ROWS[1]])
    second = {key: value[1:] for key, value in among.items()}
    expected, got = (replace_completions(batch, [[7, EOS]], PAD) for batch in (alone, second))
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(expected[key], got[key])


def test_putting_the_own_completions_back_changes_nothing():
    batch = DistillCollator(PAD, with_prompts=True)(ROWS)
    again = replace_completions(batch, [row["input_ids"][row["prompt_length"] :] for row in ROWS], PAD)
    for key, value in batch.items():
        assert torch.equal(value, again[key])


def test_an_empty_completion_trains_nothing():
    batch = DistillCollator(PAD, with_prompts=True)(ROWS)
    new = replace_completions(batch, [[], [7]], PAD, pad_to_multiple_of=8)
    assert new["labels"][0].eq(-100).all() and new["labels"].shape == (2, 8)


def test_replacing_needs_prompts_and_one_completion_each():
    with pytest.raises(ConfigurationError, match="with_prompts=True"):
        replace_completions(DistillCollator(PAD)(ROWS), [[1], [1]], PAD)
    with pytest.raises(ValueError, match="1 completions for 2 prompts"):
        replace_completions(DistillCollator(PAD, with_prompts=True)(ROWS), [[1]], PAD)
