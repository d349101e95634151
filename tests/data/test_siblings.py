"""More inputs of kinds that were once half read: lists, CSV files, ends and weights of messages, other layouts."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, Features, IterableDataset, Json, Value
from torch.utils import data as torch_data

from distill_trainers.data.loading import load_split
from distill_trainers.data.pairs import prepare_pairs
from distill_trainers.data.plain import plain_dataset
from distill_trainers.data.tokenization import prepare_dataset
from distill_trainers.exceptions import DatasetError

WITH_CALLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "use", "parameters": {"type": "object", "properties": {}}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def call(**arguments):
    return assistant("", tool_calls=[{"type": "function", "function": {"name": "use", "arguments": arguments}}])


def whole(tokenizer, dataset, **settings):
    """Of each row the text, and what is trained of it."""
    rows = list(prepare_dataset(dataset, tokenizer, max_length=2000, **settings))
    trained = ["".join(tokenizer.decode([t]) for t in row["labels"] if t != -100) for row in rows]
    return list(zip([tokenizer.decode(row["input_ids"]) for row in rows], trained, strict=True))


# ---- Lists and streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain_rows", [1, 1001])
def test_columns_of_later_rows_of_a_list_are_read(make_tokenizer, plain_rows):
    rows = [{"messages": [user("a"), assistant("b")]}] * plain_rows
    last = {"messages": [user("c"), assistant("d", weight=0), user("e"), assistant("f")], "tools": [TOOL]}
    read = whole(make_tokenizer(template=WITH_CALLS), [*rows, last], assistant_only_loss=True)
    assert len(read) == plain_rows + 1
    assert read[-1][0].startswith(json.dumps([TOOL])) and read[-1][1] == "f<|im_end|>"
    assert not read[0][0].startswith("[")


def test_values_of_a_list_keep_their_kinds(make_tokenizer):
    rows = [{"messages": [user("a"), call(n=value)]} for value in (1, 2.5, "x", [1, "y"])]
    shown = ['"n": 1}', '"n": 2.5}', '"n": "x"}', '"n": [1, "y"]}']
    read = whole(make_tokenizer(template=WITH_CALLS), rows)
    assert all(text in trained for text, (_, trained) in zip(shown, read, strict=True))


def test_a_list_of_rows_of_a_table_loses_what_the_table_added(make_tokenizer):
    table = Dataset.from_list([{"messages": [user("a"), call(x="1")]}, {"messages": [user("a"), call(y="2")]}])
    for rows in (list(table), torch_data.Subset(table, [0, 1])):
        read = whole(make_tokenizer(template=WITH_CALLS), rows)
        assert [trained.count("null") for _, trained in read] == [0, 0]


def test_text_and_parts_may_be_mixed_in_a_list(tokenizer):
    rows = [{"messages": [user(content), assistant("b")]} for content in ("q", [{"type": "text", "text": "q"}])]
    one, other = whole(tokenizer, rows)
    assert one == other


def test_an_iterable_that_can_be_read_once_is_refused():
    class Once(torch_data.IterableDataset):
        def __init__(self):
            self.rows = iter([{"prompt": "a", "completion": "b"}] * 3)

        def __iter__(self):
            return self.rows

    with pytest.raises(DatasetError, match="can be read once only"):
        plain_dataset(Once())


def test_a_row_of_another_layout_is_refused_by_its_number(tokenizer):
    def rows():
        yield {"prompt": "a", "completion": "b"}
        yield {"messages": [user("c"), assistant("d")]}

    with pytest.raises(DatasetError, match=r"Row 1 .* lacks \['prompt', 'completion'\]"):
        whole(tokenizer, IterableDataset.from_generator(rows))


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("answers", [["007", "08"], ["1.50", "2"], ["NA", "None", "null", "nan"], ["True", "False"]])
def test_csv_is_read_as_it_is_written(tmp_path, tokenizer, answers, stream):
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "".join(f"1,{answer}\n" for answer in answers))
    right = [(f"1{answer}<|im_end|>", f"{answer}<|im_end|>") for answer in answers]
    for path in (tmp_path / "a.csv", tmp_path):
        assert whole(tokenizer, load_split(str(path), streaming=stream)) == right
    for files in ("*.csv", ["a.csv"], {"train": "a.csv"}, {"train": ["**/a.csv"]}):
        assert whole(tokenizer, load_split(str(tmp_path), data_files=files, streaming=stream)) == right


@pytest.mark.parametrize("write", [json.dumps, str])
def test_lists_of_messages_as_text_are_not_trained_as_text(tokenizer, write):
    rows = [{"prompt": write([user("a")]), "completion": write([assistant("b")])}]
    with pytest.raises(DatasetError, match="text of a list of messages"):
        whole(tokenizer, rows)
    pairs = [{"chosen": write([user("a"), assistant("b")]), "rejected": write([user("a"), assistant("c")])}]
    with pytest.raises(DatasetError, match="text of a list of messages"):
        prepare_pairs(pairs, tokenizer, max_length=200)


# ---- Messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|im_end|><|im_end|> "])
def test_ends_that_earlier_messages_bring_stand_once(tokenizer, end):
    rows = [{"messages": [user(f"a{e}"), assistant(f"b{e}"), user("c"), assistant(f"d{e}")]} for e in ("", end)]
    plain, brought = whole(tokenizer, rows, assistant_only_loss=True)
    assert plain == brought and plain[1] == "b<|im_end|>d<|im_end|>"


def test_an_end_within_a_message_stays(tokenizer):
    (text, trained), *_ = whole(tokenizer, [{"messages": [user("a"), assistant("b<|im_end|>c")]}])
    assert trained == "b<|im_end|>c<|im_end|>"


@pytest.mark.parametrize("loss", [False, 0])
def test_ms_swifts_loss_is_a_weight(tokenizer, loss):
    row = {"messages": [user("a"), assistant("b", loss=loss), user("c"), assistant("d", loss=True)]}
    assert whole(tokenizer, [row], assistant_only_loss=True)[0][1] == "d<|im_end|>"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("a"), assistant("b")]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": [user("a")], "completion": [assistant("b")]},
    ],
)
def test_a_system_prompt_in_a_column_of_its_own_is_read(tokenizer, row):
    begun = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na"
    assert whole(tokenizer, [{**row, "system": "Be brief."}])[0][0].startswith(begun)
    assert whole(tokenizer, [{**row, "system": ""}])[0][0].startswith("<|im_start|>user")


def test_a_conversation_keeps_its_own_system_prompt(tokenizer):
    messages = [{"role": "system", "content": "Mine."}, user("a"), assistant("b")]
    assert "Yours" not in whole(tokenizer, [{"messages": messages, "system": "Yours."}])[0][0]


def test_pairs_read_the_system_column(tokenizer):
    pair = {"system": "Be brief.", "prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    (row,) = prepare_pairs([pair], tokenizer, max_length=200)
    assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_nulls_of_json_columns_stay_in_pairs_too(make_tokenizer):
    rows = {"prompt": [[user("a")]], "chosen": [[call(city=None)]], "rejected": [[call(city="Rome")]]}
    dataset = Dataset.from_dict(rows, features=Features(dict.fromkeys(rows, Json())))
    (row,) = prepare_pairs(dataset, make_tokenizer(template=WITH_CALLS), max_length=400)
    assert '{"city": null}' in make_tokenizer().decode(row["input_ids"])


def test_templates_without_a_default_are_refused_in_words(make_tokenizer):
    tokenizer = make_tokenizer(template={"rag": WITH_CALLS})
    with pytest.raises(DatasetError, match="multiple chat templates with no default"):
        whole(tokenizer, [{"messages": [user("a"), assistant("b")]}])


def test_rows_of_numbers_are_no_json():
    rows = plain_dataset([{"input_ids": [1, 2], "note": {"a": 1}}, {"input_ids": [3], "note": None}])
    assert rows.features["input_ids"].feature == Value("int32") or rows.features["input_ids"].feature == Value("int64")
    assert rows[:]["input_ids"] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": None}, "'input_ids' holds NoneType"),
        ({"input_ids": [1, None, 3]}, "expected a list of whole numbers"),
        ({"input_ids": [[4, 5]]}, "expected a list of whole numbers"),
        ({"input_ids": "4 5"}, "'input_ids' holds str"),
        ({"input_ids": [1.5, 2.5]}, "expected a list of whole numbers"),
        ({"input_ids": [4, 5, 6], "loss_mask": [0, 1, 7]}, "loss_mask has 7"),
        ({"input_ids": [4, 5, 6], "completion_mask": [0, None, 1]}, "completion_mask has None"),
        ({"input_ids": [4, 5, 6], "attention_mask": [1, 1]}, "attention_mask of 2"),
    ],
)
def test_tokens_and_masks_of_another_kind_are_refused(tokenizer, row, message):
    with pytest.raises(DatasetError, match=message):
        whole(tokenizer, [row])
