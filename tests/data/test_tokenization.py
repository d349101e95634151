"""Whole datasets: what is dropped, counted, refused, and that streams are prepared alike."""

import logging
import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from distill_trainers.data.loading import load_split
from distill_trainers.data.tokenization import prepare_dataset
from distill_trainers.exceptions import ConfigurationError, DatasetError

COLUMNS = ["input_ids", "labels", "length", "prompt_length"]


def pairs(*rows):
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])


def test_a_prepared_dataset_has_its_columns_and_lengths(tokenizer):
    prepared = prepare_dataset(pairs(("ab", "c"), ("d", "efg")), tokenizer, max_length=16)
    assert sorted(prepared.column_names) == COLUMNS
    assert prepared["length"][:] == [4, 5]
    assert prepared[0]["input_ids"] == [*tokenizer("abc")["input_ids"], tokenizer.eos_token_id]


def test_preparing_twice_changes_nothing(tokenizer):
    once = prepare_dataset(pairs(("ab", "c"), ("d", "efg")), tokenizer, max_length=16)
    assert prepare_dataset(once, tokenizer, max_length=16).to_list() == once.to_list()


def test_a_stream_is_prepared_like_a_dataset(tokenizer):
    rows = pairs(("ab", "c"), ("q", ""), ("d" * 40, "efg"), ("x", "y"))
    prepared = prepare_dataset(rows, tokenizer, max_length=16)
    stream = prepare_dataset(rows.to_iterable_dataset(), tokenizer, max_length=16)
    assert isinstance(stream, IterableDataset)
    assert list(stream) == prepared.to_list() and len(prepared) == 3


def test_a_stream_from_a_generator_keeps_its_first_row(tokenizer):
    stream = IterableDataset.from_generator(lambda: ({"question": q, "answer": "a"} for q in "xyz"))
    mapping = {"question": "prompt", "answer": "completion"}
    rows = list(prepare_dataset(stream, tokenizer, max_length=8, column_mapping=mapping))
    assert [tokenizer.decode(row["input_ids"][:1]) for row in rows] == ["x", "y", "z"]
    assert sorted(rows[0]) == COLUMNS


def test_several_processes_give_the_same_rows(tokenizer):
    rows = pairs(("ab", "c"), ("q", ""), ("d", "efg"), ("x", "y"))
    alone = prepare_dataset(rows, tokenizer, max_length=16)
    assert prepare_dataset(rows, tokenizer, max_length=16, num_proc=2).to_list() == alone.to_list()


def test_cuts_and_drops_are_logged_once_in_numbers(tokenizer, caplog):
    rows = pairs(("a", "b"), ("p" * 30, "c"), ("p" * 30, "c" * 30), ("q", ""), ("q", " "))
    with caplog.at_level(logging.WARNING):
        prepared = prepare_dataset(rows, tokenizer, max_length=10, name="mine")
    assert len(prepared) == 3 and max(prepared["length"]) == 10
    (record,) = caplog.records
    text = record.getMessage()
    assert "'mine', 5 rows" in text
    assert "2 rows dropped (2 empty completion; the first is row 3)" in text
    assert "beginning of 2 prompts" in text and "end of 1 completions" in text


def test_nothing_is_logged_when_nothing_is_lost(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        prepare_dataset(pairs(("a", "b")), tokenizer, max_length=10)
    assert not caplog.records


def test_an_overlong_prompt_keeps_its_end_and_the_completion(tokenizer):
    (row,) = prepare_dataset(pairs(("x" * 50 + "end", "ok")), tokenizer, max_length=8)
    assert tokenizer.decode(row["input_ids"]) == "xxendok<|im_end|>"
    assert row["prompt_length"] == 5


def test_a_completion_that_lost_its_end_lost_its_eos(tokenizer):
    (row,) = prepare_dataset(pairs(("ab", "c" * 50)), tokenizer, max_length=8)
    assert row["length"] == 8 and tokenizer.eos_token_id not in row["input_ids"]


def test_prompts_leave_room_for_rollouts(tokenizer):
    prompts = Dataset.from_dict({"prompt": ["x" * 50 + "end"]})
    (row,) = prepare_dataset(prompts, tokenizer, max_length=8, max_new_tokens=5, needs="prompt")
    assert tokenizer.decode(row["input_ids"]) == "end"


def test_empty_completions_serve_where_prompts_are_enough(tokenizer):
    rows = pairs(("a", "b"), ("q", ""), ("", "c"))
    kept = {needs: len(prepare_dataset(rows, tokenizer, max_length=8, needs=needs)) for needs in NEEDS}
    assert kept == {"completion": 2, "prompt": 2, "either": 3, "both": 1}


NEEDS = ("completion", "prompt", "either", "both")


@pytest.mark.parametrize("stream", [False, True])
def test_strict_names_the_row_of_an_empty_completion(tokenizer, stream):
    rows = pairs(("a", "b"), ("q", ""))
    rows = rows.to_iterable_dataset() if stream else rows
    with pytest.raises(DatasetError, match="Row 1 of dataset 'train' has an empty completion"):
        list(prepare_dataset(rows, tokenizer, max_length=8, strict=True))


def test_rows_that_all_fail_are_an_error(tokenizer):
    with pytest.raises(DatasetError, match="None of the 2 rows.*2 empty completion.*column_mapping"):
        prepare_dataset(pairs(("a", ""), ("q", "")), tokenizer, max_length=8)


def test_a_row_that_cannot_be_tokenised_is_named(tokenizer):
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "q"}]}, {"messages": [{"content": "q"}]}])
    with pytest.raises(DatasetError, match="Row 1 of dataset 'train'.*no role"):
        prepare_dataset(rows, tokenizer, max_length=64, needs="prompt")


def test_conversations_opened_by_the_assistant_are_counted(tokenizer, caplog):
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = Dataset.from_list([{"messages": [assistant]}, {"messages": [user, assistant]}])
    with caplog.at_level(logging.WARNING):
        assert len(prepare_dataset(rows, tokenizer, max_length=99)) == 1
    assert "1 empty row, or conversation that an assistant opens; the first is row 0" in caplog.text


@pytest.mark.parametrize("dataset", [Dataset.from_list([]), IterableDataset.from_generator(lambda: iter([]))])
def test_empty_datasets_are_refused(tokenizer, dataset):
    with pytest.raises(DatasetError, match="is empty"):
        prepare_dataset(dataset, tokenizer, max_length=8)


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        (Dataset.from_dict({"prompt": ["q"]}), {}, "prompts alone"),
        (Dataset.from_dict({"prompt": ["q"]}), {"needs": "both"}, "prompts alone"),
        (Dataset.from_dict({"text": ["q"]}), {"needs": "prompt"}, "plain text"),
        (Dataset.from_dict({"text": ["q"]}), {"assistant_only_loss": True}, "needs conversations"),
        (Dataset.from_dict({"question": ["q"]}), {}, "fit none of the accepted layouts"),
        (DatasetDict(train=Dataset.from_dict({"text": ["q"]})), {}, r"splits \['train'\]"),
        ({"text": ["q"]}, {}, "is a dict, expected .*Dataset.from_dict"),
    ],
)
def test_datasets_that_cannot_serve_are_refused(tokenizer, dataset, settings, message):
    with pytest.raises(DatasetError, match=message):
        prepare_dataset(dataset, tokenizer, max_length=8, **settings)


@pytest.mark.parametrize(("max_length", "max_new_tokens"), [(1, None), (8, 8)])
def test_lengths_without_room_are_refused(tokenizer, max_length, max_new_tokens):
    with pytest.raises(ConfigurationError, match="max_length"):
        prepare_dataset(pairs(("a", "b")), tokenizer, max_length=max_length, max_new_tokens=max_new_tokens)


def test_a_dataset_on_disk_is_prepared_anew_for_another_template(make_tokenizer, tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    Dataset.from_list([{"messages": messages}]).save_to_disk(tmp_path / "saved")
    dataset = Dataset.load_from_disk(tmp_path / "saved")
    first = prepare_dataset(dataset, make_tokenizer(), max_length=64)
    other = make_tokenizer(template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    second = prepare_dataset(dataset, other, max_length=64)
    assert second["length"][0] < first["length"][0]


def _real_data() -> Path:
    folder = os.environ.get("DISTILL_TRAINERS_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DISTILL_TRAINERS_DATA does not name a folder with the development data")
    return Path(folder)


def test_real_questions(tokenizer, monkeypatch, tmp_path):
    data = _real_data()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    mapping = {"question": "prompt", "answer": "completion"}
    dataset = load_split(str(data / "gsm8k" / "train.jsonl"), split="train[:200]", column_mapping=mapping)
    prepared = prepare_dataset(dataset, tokenizer, max_length=4096)
    assert len(prepared) == 200
    row, source = prepared[7], dataset[7]
    assert tokenizer.decode(row["input_ids"][: row["prompt_length"]]) == source["prompt"]
    assert tokenizer.decode(row["input_ids"][row["prompt_length"] :]) == source["completion"] + tokenizer.eos_token


def test_real_conversations(tokenizer, monkeypatch, tmp_path):
    data = _real_data()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    path = str(data / "preferences" / "dpo_en_demo.json")
    dataset = load_split(path, split="train[:50]", column_mapping={"conversations": "prompt", "chosen": "completion"})
    dataset = dataset.map(lambda row: {"completion": [row["completion"]]}).remove_columns("rejected")
    prepared = prepare_dataset(dataset, tokenizer, max_length=4096)
    row = prepared[0]
    completion = tokenizer.decode(row["input_ids"][row["prompt_length"] :])
    assert dataset[0]["completion"][0]["value"] in completion or row["length"] == 4096
    assert tokenizer.decode(row["input_ids"][: row["prompt_length"]]).startswith("<|im_start|>")
