"""Questions with rationales to tokens: prompts of each task, where a chain's answer begins, cuts, batches."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset

from distill_trainers.data.rationales import (
    RationaleCollator,
    RationaleTemplates,
    RationaleTokenizer,
    prepare_rationales,
    with_innovations,
)
from distill_trainers.exceptions import DatasetError

ROW = {
    "question": "What is 2 + 3?",
    "answer": 5,
    "rationale": "2 + 3 = 5, {so}.",
    "wrong_rationale": "2 + 3 = 6, {so}.",
}


def work(tokenizer, objective="step_by_step", style="auto", max_length=None, **more):
    given = {name: more.pop(name) for name in list(more) if name in ("label_prompt", "chain_completion")}
    return RationaleTokenizer(
        tokenizer, RationaleTemplates.of(style, tokenizer, **given), objective, max_length, **more
    )


def told(tokenizer, sequence, name="labels"):
    off = {"labels": -100, "marks": 0}[name]
    return tokenizer.decode([i for i, on in zip(sequence["input_ids"], sequence[name], strict=True) if on != off])


def prompt(tokenizer, sequence):
    return tokenizer.decode(sequence["input_ids"][: sequence["prompt_length"]])


def test_tasks_are_told_apart_by_a_prefix(make_tokenizer):
    tokenizer = make_tokenizer(template=None)
    found = work(tokenizer).example(ROW)
    assert prompt(tokenizer, found["first"]) == "predict: What is 2 + 3?\n"
    assert prompt(tokenizer, found["other"]) == "explain: What is 2 + 3?\n"
    assert told(tokenizer, found["first"]) == "5<|im_end|>"
    assert told(tokenizer, found["other"]) == "2 + 3 = 5, {so}.<|im_end|>"


def test_tasks_are_told_apart_by_an_instruction_in_chats(tokenizer):
    found = work(tokenizer).example(ROW)
    for name, said in (("first", "Give the final answer only."), ("other", "Explain step by step")):
        text = prompt(tokenizer, found[name])
        assert text.startswith("<|im_start|>user\nWhat is 2 + 3?\n\n") and said in text
        assert text.endswith("<|im_start|>assistant\n")
    assert told(tokenizer, found["first"]) == "5<|im_end|>"


@pytest.mark.parametrize("style", ["text", "chat"])
def test_a_chain_is_marked_where_its_rationale_ends(tokenizer, style):
    found = work(tokenizer, "dual_chain", style).example(ROW)
    assert found["other"] is None
    assert told(tokenizer, found["first"]) == "2 + 3 = 5, {so}.\nThe answer is 5.<|im_end|>"
    assert told(tokenizer, found["first"], "marks") == "\nThe answer is 5.<|im_end|>"


def test_key_steps_are_found_in_the_students_tokens(tokenizer):
    found = work(tokenizer, "edit", "text").example({**ROW, "wrong_answer": "6"})
    assert told(tokenizer, found["first"], "marks") == "55" and told(tokenizer, found["other"], "marks") == "66"
    assert told(tokenizer, found["other"]) == "66"
    assert told(tokenizer, found["first"]).startswith("2 + 3 = 5")


def test_choices_stand_below_the_question(make_tokenizer):
    tokenizer = make_tokenizer(template=None)
    row = {"question": "Where?", "choices": ["shelf", "fridge"], "answer": "(B)", "rationale": "Cold."}
    assert prompt(tokenizer, work(tokenizer).example(row)["first"]) == "predict: Where?\n(A) shelf\n(B) fridge\n"


def test_a_template_may_put_something_before_a_chain(make_tokenizer):
    """As Llama 2's does (a space, which makes another token of the first word): all of the chain passed for answer."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + ('~' if m['role'] == 'assistant' else '') }}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    found = work(tokenizer, "dual_chain", "chat").example(ROW)["first"]
    assert told(tokenizer, found, "marks") == "\nThe answer is 5.<|im_end|>"
    assert told(tokenizer, found).startswith("~2 + 3")


def test_marks_are_cut_with_their_tokens(make_tokenizer):
    tokenizer = make_tokenizer(template=None, bos=True)
    whole = work(tokenizer, "dual_chain").example(ROW)["first"]
    assert whole["input_ids"][0] == tokenizer.bos_token_id
    for length in range(3, len(whole["input_ids"]) + 2):
        cut = work(tokenizer, "dual_chain", max_length=length).example(ROW)["first"]
        assert len({len(cut[name]) for name in ("input_ids", "labels", "marks")}) == 1
        assert len(cut["input_ids"]) == min(length, len(whole["input_ids"]))
        assert "\nThe answer is 5.<|im_end|>".startswith(told(tokenizer, cut, "marks"))
        assert cut["input_ids"][0] == tokenizer.bos_token_id


def test_rows_that_cannot_train_are_dropped_and_counted(tokenizer, caplog):
    rows = [ROW, {**ROW, "rationale": ""}, {**ROW, "wrong_rationale": ""}, {**ROW, "wrong_rationale": ROW["rationale"]}]
    data = Dataset.from_list(rows)
    with caplog.at_level(logging.WARNING):
        kept = prepare_rationales(data, work(tokenizer, "edit"), needs="other")
    assert len(kept) == 1 and "3 without a wrong rationale that differs" in caplog.text
    assert len(prepare_rationales(data, work(tokenizer), needs="any")) == 4  # labels are left
    assert kept[0]["reference"] == "5" and kept[0]["length"] > 20


def test_rows_of_the_wrong_kind_are_named(tokenizer):
    rows = Dataset.from_list([{**ROW, "answer": ["5"]}])
    with pytest.raises(DatasetError, match="Row 0 of dataset 'train'.*'answer' holds list"):
        prepare_rationales(rows, work(tokenizer))


def test_streams(tokenizer):
    stream = Dataset.from_list([ROW, {**ROW, "answer": None, "rationale": ""}]).to_iterable_dataset()
    rows = list(prepare_rationales(stream, work(tokenizer), needs="any"))
    assert len(rows) == 1 and "dropped" not in rows[0]


def test_batches_hold_firsts_and_below_them_others(tokenizer):
    rows = [dict(row) for row in prepare_rationales(Dataset.from_list([ROW] * 3), work(tokenizer), needs="any")]
    rows[1] |= {f"other_{name}": [] for name in ("input_ids", "labels", "marks")}
    batch = RationaleCollator(tokenizer.pad_token_id, "step_by_step", with_prompts=True)(rows)
    assert batch["input_ids"].shape[0] == 6 and batch["examples"].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch["token_label"][3:].sum() == 0 == batch["token_rationale"][:3].sum()
    assert batch["token_rationale"].sum(1).bool().tolist() == [False] * 3 + [True, False, True]
    assert torch.equal(batch["token_given"].bool(), batch["labels"] != -100)
    assert batch["prompt_ids"].shape[0] == 3 and batch["references"] == [("5", [])] * 3
    alone = RationaleCollator(tokenizer.pad_token_id, "step_by_step", with_others=False)(rows)
    assert alone["input_ids"].shape[0] == 3


def test_innovations_are_rows_below_the_others(tokenizer):
    data = prepare_rationales(Dataset.from_list([ROW] * 2), work(tokenizer, "dual_chain"))
    batch = RationaleCollator(tokenizer.pad_token_id, "dual_chain", False, with_prompts=True)([*data])
    width = batch["labels"].shape[1]
    for length in (3, width + 5):
        new = with_innovations(batch, [([7] * length, 1)], tokenizer.pad_token_id)
        assert new["labels"].shape == (3, max(width, length)) and "prompt_ids" not in new and "references" not in new
        assert new["token_innovation"].sum() == length - 1 and not new["token_innovation"][:2].any()
        assert torch.equal(new["labels"][:2, :width], batch["labels"])
        assert new["attention_mask"][2].sum() == length
    same = with_innovations(batch, [], tokenizer.pad_token_id)
    assert torch.equal(same["labels"], batch["labels"])
