"""Preference pairs: layouts, prompts that are implied, what is refused, what is cut, and batches of both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from distill_trainers.data import PairCollator, prepare_pairs
from distill_trainers.data.pairs import LAYOUT, is_pair, split_pair
from distill_trainers.exceptions import DatasetError

USER, GOOD, POOR = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "five")))
PAIR = {"prompt": "2+2=", "chosen": "4", "rejected": "five"}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]}


def prepared(rows, tokenizer, **settings):
    return prepare_pairs(Dataset.from_list(rows), tokenizer, **{"max_length": 200, **settings})


def texts(row, tokenizer):
    start = row["prompt_length"]
    return [tokenizer.decode(ids) for ids in (row["input_ids"][:start], row["input_ids"][start:], row["rejected_ids"])]


# ---- Layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"chosen": "2+2= 4", "rejected": "2+2= five"},
        {"prompt": "2+2=", "chosen": "4", "rejected": "five", "score": 0.3},
    ],
    ids=["explicit", "implicit", "other columns"],
)
def test_strings(tokenizer, row):
    (found,) = prepared([row], tokenizer)
    space = " " if "prompt" not in row else ""
    assert texts(found, tokenizer) == ["2+2=", f"{space}4<|im_end|>", f"{space}five<|im_end|>"]
    assert found["labels"] == [-100] * found["prompt_length"] + found["input_ids"][found["prompt_length"] :]
    assert found["rejected_labels"] == found["rejected_ids"]
    assert found["length"] == found["prompt_length"] + len(found["rejected_ids"])


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"chosen": [USER, GOOD], "rejected": [USER, POOR]},
        {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, POOR]},
        {"conversations": [{"from": "human", "value": "2+2?"}], "chosen": GOOD, "rejected": POOR},
        {"messages": [USER], "chosen": [GOOD], "rejected": [POOR]},
    ],
    ids=["explicit", "implicit", "prompt repeated as a string", "single messages", "messages as prompt"],
)
def test_conversations(tokenizer, row):
    (found,) = prepared([row], tokenizer)
    prompt = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(found, tokenizer) == [prompt, "4<|im_end|>", "five<|im_end|>"]


@pytest.mark.parametrize("row", [PAIR, CHAT, {"chosen": [USER, GOOD], "rejected": [USER, POOR]}], ids=str)
def test_prompts_are_extracted_as_trl_does(row):
    from trl.data_utils import maybe_extract_prompt

    expected = maybe_extract_prompt(dict(row))
    assert split_pair(row) == (expected["prompt"], expected["chosen"], expected["rejected"])


def test_pairs_are_told_by_their_columns():
    assert is_pair(PAIR) and not is_pair({"prompt": "q", "completion": "a"})
    assert is_pair({"q": 1, "good": 2, "bad": 3}, {"good": "chosen", "bad": "rejected"})
    assert "chosen" in LAYOUT


def test_published_pairs_of_another_library(tokenizer):
    file = Path(__file__).parents[3] / "shared" / "data" / "preferences" / "dpo_en_demo.json"
    if not file.is_file():
        pytest.skip("the shared data is not here")
    rows = json.loads(file.read_text())[:40]
    found = prepared(
        [{k: r[k] for k in ("conversations", "chosen", "rejected")} for r in rows], tokenizer, max_length=40000
    )
    assert len(found) == 40
    for row, given in zip(found, rows, strict=True):
        prompt, chosen, rejected = texts(row, tokenizer)
        assert prompt.endswith("<|im_start|>assistant\n") and given["conversations"][-1]["value"].strip() in prompt
        assert given["chosen"]["value"].strip() in chosen and given["rejected"]["value"].strip() in rejected


def test_a_stream(tokenizer):
    stream = Dataset.from_list([PAIR, {**PAIR, "rejected": "4"}]).to_iterable_dataset()
    assert len(list(prepare_pairs(stream, tokenizer, max_length=50, drop_bad=True))) == 1
    with pytest.raises(DatasetError, match="identical"):
        list(prepare_pairs(stream, tokenizer, max_length=50))


# ---- What cannot be trained on --------------------------------------------------------------------------------------

FAULTS = {
    "identical": ({**PAIR, "rejected": "4"}, "chosen and rejected are identical"),
    "identical conversations": (
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
        "chosen and rejected are identical",
    ),
    "empty rejected": ({**PAIR, "rejected": " "}, "empty rejected"),
    "missing rejected": ({**PAIR, "rejected": None}, "empty rejected"),
    "silent rejected": ({**CHAT, "rejected": [{"role": "assistant", "content": ""}]}, "empty rejected"),
    "empty chosen": ({**PAIR, "chosen": ""}, "empty chosen"),
    "empty prompt": ({**PAIR, "prompt": ""}, "empty prompt"),
    "long prompt": ({**PAIR, "prompt": "2+2=" * 60}, "prompt as long as max_length or longer"),
    "alike when cut": (
        {"prompt": "q" * 190, "chosen": "a" * 20 + "b", "rejected": "a" * 20 + "c"},
        "identical once cut to max_length",
    ),
    "another template": ({**PAIR, "chosen": "4<|eot_id|>"}, r"<\|eot_id\|> belongs to the chat template of another"),
    "another template in a conversation": (
        {**CHAT, "rejected": [{"role": "assistant", "content": "[INST] five [/INST]"}]},
        r"\[INST\] belongs to the chat template of another",
    ),
}


@pytest.mark.parametrize("row, reason", FAULTS.values(), ids=FAULTS)
def test_bad_pairs_are_refused_or_dropped(tokenizer, caplog, row, reason):
    good = CHAT if isinstance(row["chosen"], list) else PAIR
    if set(row) != set(good):
        good = {"chosen": [USER, GOOD], "rejected": [USER, POOR]}
    with pytest.raises(DatasetError, match=reason) as caught:
        prepared([good, row, good], tokenizer)
    for part in ("1 of the 3 pairs", "the first is row 1", "bad_pairs: drop"):
        assert part in str(caught.value)
    assert len(prepared([good, row, good], tokenizer, drop_bad=True)) == 2
    assert "left out" in caplog.text
    with pytest.raises(DatasetError, match="none to train on"):
        prepared([row], tokenizer, drop_bad=True)


def test_the_tokenizers_own_markers_are_not_foreign(tokenizer):
    (found,) = prepared([{"prompt": "<|im_start|>user\nq<|im_end|>\n", "chosen": "a", "rejected": "b"}], tokenizer)
    assert texts(found, tokenizer)[0].startswith("<|im_start|>user")


def test_responses_are_cut_and_prompts_are_not(tokenizer, caplog):
    row = {"prompt": "q" * 30, "chosen": "abc" * 10, "rejected": "xy"}
    (found,) = prepared([row], tokenizer, max_length=40)
    assert texts(found, tokenizer) == ["q" * 30, "abcabcabca", "xy<|im_end|>"] and found["length"] == 40
    assert "cut the end of responses of 1 pairs" in caplog.text


# ---- Batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [None, 8])
def test_a_batch_holds_all_chosen_then_all_rejected(tokenizer, multiple):
    rows = prepared([PAIR, {"prompt": "1+1=", "chosen": "two, surely", "rejected": "3"}], tokenizer)
    batch = PairCollator(tokenizer.pad_token_id, multiple, with_prompts=True)(list(rows))
    width = batch["input_ids"].shape[1]
    assert batch["input_ids"].shape[0] == 4 and (multiple is None or width % multiple == 0)
    expected = [rows[0]["input_ids"], rows[1]["input_ids"]]
    expected += [row["input_ids"][: row["prompt_length"]] + row["rejected_ids"] for row in rows]
    for i, ids in enumerate(expected):
        assert batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist() == ids
        assert batch["labels"][i][batch["labels"][i] != -100].tolist() == ids[4:]
    trained = batch["labels"] != -100
    assert torch.equal(batch["token_chosen"] + batch["token_rejected"], trained.float())
    assert batch["token_chosen"][2:].sum() == batch["token_rejected"][:2].sum() == 0
    assert batch["token_pair"].nonzero().tolist() == [[0, 4], [1, 4]]
    assert batch["prompt_ids"].shape[0] == 2


def test_rows_without_a_rejected_response_make_ordinary_batches(tokenizer):
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "prompt_length": 1}
    assert set(PairCollator(0)([row])) == {"input_ids", "attention_mask", "labels"}


# ---- Final numbers --------------------------------------------------------------------------------------------------


def test_a_pair_without_prompt_is_counted_once():
    """Its first token is predicted by nothing, so the second stands for it."""
    pair = {"input_ids": [3, 4, 5], "labels": [3, 4, 5], "prompt_length": 0}
    pair |= {"rejected_ids": [6, 7], "rejected_labels": [6, 7]}
    batch = PairCollator(0)([pair, pair])
    assert batch["token_pair"].tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert batch["token_chosen"].sum() == 4 and batch["token_rejected"].sum() == 2
