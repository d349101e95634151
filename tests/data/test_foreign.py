"""Data collators of transformers, of TRL and of users: the same batches as this package's own, or a refusal."""

import logging

import numpy as np
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from distill_trainers.data.collator import DistillCollator
from distill_trainers.data.foreign import ForeignCollator, fitted
from distill_trainers.data.packing import unpacked
from distill_trainers.data.pairs import PairCollator
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.toy import character_tokenizer

TOKENIZER = character_tokenizer()
PAD, EOS = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
# The padding token stands in the text too, and EOS at its end.
ROWS = [
    {"input_ids": [5, PAD, 7, 8, EOS], "labels": [-100, -100, 7, 8, EOS], "prompt_length": 2, "length": 5},
    {"input_ids": [9, 3, EOS], "labels": [-100, 3, EOS], "prompt_length": 1, "length": 3},
]
IDS = [[5, PAD, 7, 8, EOS], [9, 3, EOS, PAD, PAD]]
MASK = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
LABELS = [[-100, -100, 7, 8, EOS], [-100, 3, EOS, -100, -100]]


def read(collate, rows=ROWS, **own):
    return ForeignCollator(collate, DistillCollator(PAD, **own))(rows)


def eos_is_pad():
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def masking():
    tokenizer = character_tokenizer()
    tokenizer.mask_token = "+"
    return tokenizer


def left():
    tokenizer = character_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


PADDING = {
    "seq2seq": DataCollatorForSeq2Seq(TOKENIZER),
    "seq2seq, pad is eos": DataCollatorForSeq2Seq(eos_is_pad()),
    "seq2seq, left": DataCollatorForSeq2Seq(left()),
    "language modelling": DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
    "language modelling, pad is eos": DataCollatorForLanguageModeling(eos_is_pad(), mlm=False),
    "language modelling, left": DataCollatorForLanguageModeling(left(), mlm=False),
    "with padding": DataCollatorWithPadding(TOKENIZER),
    "with padding, left": DataCollatorWithPadding(left()),
    "TRL": TRLCollator(PAD),
    "own subclass": type("Own", (DistillCollator,), {})(PAD),
    "own, numpy": lambda rows: {n: v.numpy() for n, v in DistillCollator(PAD)(rows).items()},
    "own, lists": lambda rows: {n: v.tolist() for n, v in DistillCollator(PAD)(rows).items()},
    "own, 32 bits": lambda rows: {n: v.int() for n, v in DistillCollator(PAD)(rows).items()},
    "own, bool mask": lambda rows: DistillCollator(PAD)(rows) | {"attention_mask": np.array(MASK, bool)},
    "own, no mask": lambda rows: {"input_ids": IDS, "labels": LABELS},
    "own, no mask, left": lambda rows: {"input_ids": [[5, PAD, 7, 8, EOS], [PAD, PAD, 9, 3, EOS]]},
    "own, ids alone": lambda rows: {"input_ids": IDS},
    "own, another padding": lambda rows: {"input_ids": [IDS[0], [9, 3, EOS, -100, 999]], "attention_mask": MASK},
    "own, prompts trained": lambda rows: {
        "input_ids": IDS,
        "attention_mask": MASK,
        "labels": torch.tensor(IDS).masked_fill(torch.tensor(MASK) == 0, -100),
    },
}


@pytest.mark.parametrize("name", PADDING)
def test_padding_collators_give_the_batches_of_this_package(name):
    """Labels of the prompt never, EOS always; padding on the right, known by lengths."""
    batch = read(PADDING[name])
    assert batch["input_ids"].tolist() == IDS
    assert batch["attention_mask"].tolist() == MASK
    assert batch["labels"].tolist() == LABELS
    assert {batch[key].dtype for key in ("input_ids", "attention_mask", "labels")} == {torch.int64}


FLAT = [5, PAD, 7, 8, EOS, 9, 3, EOS]
FLATTENING = {
    "flattening": DataCollatorWithFlattening(),
    "flattening, kernels": DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    "flattening, lengths alone": DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True),
    "flattening, numbers alone": DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True),
    "TRL": TRLCollator(PAD, padding_free=True),
    "own, masked": lambda rows: {
        "input_ids": [FLAT],
        "attention_mask": [[1] * 8],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2]],
        "labels": [FLAT],  # every token, the first ones of rows too
    },
}


@pytest.mark.parametrize("name", FLATTENING)
def test_flattening_collators_give_packed_rows(name):
    batch = read(FLATTENING[name])
    assert batch["input_ids"].tolist() == [FLAT] and "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["labels"].tolist() == [LABELS[0] + LABELS[1][:3]]
    rows = unpacked(batch)
    assert rows["input_ids"].tolist() == [IDS[0], [9, 3, EOS, 0, 0]]
    assert (rows["attention_mask"].tolist(), rows["labels"].tolist()) == (MASK, LABELS)
    assert not {"cu_seq_lens_q", "max_length_q", "seq_idx"} & batch.keys()


def test_padding_of_packed_rows_is_a_row_of_its_own():
    """Text of rows 1 and 0 in the first row of the batch, row 1 alone in the second, padded."""
    given = {
        "input_ids": [[9, 3, EOS, 9, 3, EOS], [PAD, PAD, PAD, 9, 3, EOS]],
        "attention_mask": [[1] * 6, [0, 0, 0, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 0, 1, 2], [1, 1, 1, 0, 1, 2]],
    }
    batch = read(lambda rows: given, [ROWS[1]] * 3)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2]]
    assert batch["input_ids"].tolist() == [[9, 3, EOS] * 2, [9, 3, EOS, PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 3, EOS] * 2, [-100, 3, EOS, -100, -100, -100]]


def test_padding_that_ends_flattened_rows_is_no_text():
    batch = read(TRLCollator(PAD, padding_free=True, pad_to_multiple_of=5))
    assert batch["input_ids"].tolist() == [[*FLAT, PAD, PAD]]
    assert batch["labels"].tolist() == [[*LABELS[0], *LABELS[1][:3], -100, -100]]


def test_prompts_are_those_of_the_rows():
    batch = read(PADDING["seq2seq, left"], with_prompts=True)
    assert batch["prompt_ids"].tolist() == [[5, PAD], [PAD, 9]] and batch["prompt_mask"].tolist() == [[1, 1], [0, 1]]


def test_prompts_of_other_texts_end_at_their_first_label():
    given = {"input_ids": [[4, 4, 6, EOS]], "attention_mask": [[1] * 4], "labels": [[-100, -100, 6, EOS]]}
    batch = read(lambda rows: given, with_prompts=True)
    assert batch["prompt_ids"].tolist() == [[4, 4]]
    del given["labels"]
    with pytest.raises(DatasetError, match="no labels for them; expected `labels`"):
        read(lambda rows: given, with_prompts=True)


def test_labels_that_train_less_are_kept_and_those_that_train_more_are_not(caplog):
    less = torch.tensor(LABELS)
    less[0, 2] = -100
    given = {"input_ids": IDS, "attention_mask": MASK, "labels": less}
    assert read(lambda rows: given)["labels"].tolist() == less.tolist() and not caplog.records
    collate = ForeignCollator(PADDING["own, prompts trained"], DistillCollator(PAD))
    with caplog.at_level(logging.WARNING):
        assert [collate(ROWS)["labels"].tolist() for _ in range(2)] == [LABELS, LABELS]
    assert [("prompts?" in record.message) for record in caplog.records] == [True], "said once"


@pytest.mark.parametrize(("ids", "labels"), [([5, PAD, 7], [-100, -100, 7]), ([8, EOS], [8, EOS])])
def test_texts_that_were_cut_keep_their_labels(ids, labels):
    batch = read(lambda rows: {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, ROWS[:1])
    assert batch["labels"].tolist() == [labels]


def test_other_entries_move_with_their_tokens():
    given = {
        "input_ids": [[PAD, 9, 3, EOS]],
        "attention_mask": [[0, 1, 1, 1]],
        "token_type_ids": [[7, 0, 1, 1]],
        "token_weight": torch.tensor([[0.0, 0.1, 0.2, 0.3]]),
        "name": ["a"],
    }
    batch = read(lambda rows: given, ROWS[1:])
    assert batch["token_type_ids"].tolist() == [[0, 1, 1, 7]] and batch["name"] == ["a"]
    torch.testing.assert_close(batch["token_weight"], torch.tensor([[0.1, 0.2, 0.3, 0.0]]))


def with_mask(**entries):
    return lambda rows: {"input_ids": IDS, "attention_mask": MASK, **entries}


REFUSED = {
    "masked language modelling": (DataCollatorForLanguageModeling(masking(), mlm=True), "mlm=False"),
    "no padding": (default_data_collator, "default_data_collator failed on rows with the columns"),
    "pads the ids alone": (lambda rows: TOKENIZER.pad(rows, return_tensors="pt"), "has to pad both"),
    "no ids": (lambda rows: {"labels": LABELS}, r"gave \['labels'\]; expected a dictionary with `input_ids`"),
    "no dictionary": (lambda rows: [1], "gave list; expected a dictionary"),
    "one row": (lambda rows: {"input_ids": IDS[0]}, r"shape \[5\]; expected \[rows, tokens\]"),
    "ragged": (lambda rows: {"input_ids": [[1, 2], [3]]}, "make no tensor"),
    "shifted": (
        with_mask(labels=[[-100, 7, 8, EOS, -100], [3, EOS, -100, -100, -100]]),
        "labels that are shifted by one already; expected them unshifted",
    ),
    "other labels": (with_mask(labels=[[-100, 4, 4, 4, EOS], [-100] * 5]), "labels that differ from input_ids"),
    "mask of four dimensions": (with_mask(attention_mask=torch.ones(2, 1, 5, 5)), r"shape \[2, 1, 5, 5\]"),
    "short labels": (with_mask(labels=[[1, 2]] * 2), r"labels of the shape \[2, 2\]; expected that of input_ids"),
    "other texts without a mask": (
        lambda rows: {"input_ids": [[1, 2, PAD]], "labels": [[-100, 2, -100]]},
        "gave no `at",
    ),
    "ids that no model knows": (
        lambda rows: {"input_ids": [[1, 20]], "attention_mask": [[1, 1]], "labels": [[-100, 20]]},
        "ids 1 to 20; expected ids from 0 to 13",
    ),
    "ids below 0": (
        lambda rows: {"input_ids": [[-100, 3]], "attention_mask": [[1, 1]], "labels": [[-100, 3]]},
        "ids -100 to 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused(name):
    collate, message = REFUSED[name]
    with pytest.raises(DatasetError, match=message):
        read(collate, known_ids=len(TOKENIZER))


@pytest.mark.parametrize("collate", [FLATTENING["flattening"], with_mask(token_type_ids=MASK)])
def test_batches_for_rollouts_say_nothing_of_positions_or_types(collate):
    with pytest.raises(DatasetError, match="completions"):
        read(collate, with_prompts=True)


def test_entries_that_nobody_looks_at_are_told_of_once(caplog):
    given = with_mask(token_type_ids=MASK, score=[1.0, 2.0], token_weight=torch.ones(2, 5), length=[5, 3])
    collate = ForeignCollator(given, DistillCollator(PAD), {"token_type_ids"})
    with caplog.at_level(logging.WARNING):
        collate(ROWS), collate(ROWS)
    assert [record.message.count("gives ['score'], which") for record in caplog.records] == [1]


def test_which_collators_fit():
    own, pairs = DistillCollator(PAD, known_ids=9), PairCollator(PAD)
    assert fitted(None, own, method="gkd") is own
    assert fitted(DistillCollator(PAD, 8), own, method="gkd") == DistillCollator(PAD, 8, known_ids=9)
    assert isinstance(fitted(default_data_collator, own, method="gkd"), ForeignCollator)
    mine = type("Mine", (PairCollator,), {})(PAD)
    assert fitted(mine, pairs, method="dpkd") is mine
    with pytest.raises(ConfigurationError, match="DataCollatorForPreference; expected none, or a PairCollator"):
        fitted(DataCollatorForPreference(PAD), pairs, method="dpkd")
    with pytest.raises(ConfigurationError, match="`packing: true` makes the batches itself"):
        fitted(TRLCollator(PAD), own, method="gkd", packing=True)
