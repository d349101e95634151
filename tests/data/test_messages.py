"""Messages as people write them, read into one form: parts, calls, weights, and what a table filled in."""

import pytest
from datasets import Dataset, load_dataset

from distill_trainers.data.arrow import without_filling
from distill_trainers.data.formats import conversation_of, to_chatml
from distill_trainers.exceptions import DatasetError


def part(text, kind="text"):
    return {"type": kind, "text": text}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read(**message):
    return to_chatml([{"role": "assistant", **message}])[0]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([part("What is "), part("it?")], "What is it?"),
        ([part("a", "input_text"), part("b", "output_text"), "c"], "abc"),
        ([{"text": "a", "image_url": None}], "a"),
        ([], ""),
        (None, ""),
    ],
)
def test_parts_of_text_are_one_text(content, text):
    assert read(content=content) == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([part("What?"), {"type": "image_url", "image_url": {"url": "x"}}], "part of type 'image_url'"),
        ([{"type": "input_audio", "input_audio": {}}], "part of type 'input_audio'"),
        ([{"type": "tool_use", "name": "f"}], "part of type 'tool_use'"),
        ([{"type": "text"}], r"part of type 'text' with the keys \['type'\]"),
        (7, "content of type int"),
        ({"a": 1}, "content of type dict"),
    ],
)
def test_what_is_no_text_is_refused_by_name(content, named):
    with pytest.raises(DatasetError, match=rf"Message 1 \(role 'user'\) has (a )?{named}"):
        to_chatml([{"role": "system", "content": "s"}, {"role": "user", "content": content}])


@pytest.mark.parametrize("keys", [{"text": "hi"}, {"content": None, "refusal": "No."}, {"content": "", "answer": "4"}])
def test_text_under_another_name_than_content_is_refused(keys):
    with pytest.raises(DatasetError, match=r"has no content, but text in"):
        read(**keys)


@pytest.mark.parametrize("message", ["hi", None, 3])
def test_a_message_that_is_no_mapping_is_refused(message):
    with pytest.raises(DatasetError, match="Message 1 is of type"):
        to_chatml([{"role": "user", "content": "q"}, message])


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ('{"city": "Rome"}', {"city": "Rome"}),
        ({"city": "Rome"}, {"city": "Rome"}),
        ('{"city": null}', {"city": None}),  # text keeps its nulls
        ("", {}),
        (None, {}),
    ],
)
def test_arguments_become_a_mapping(given, arguments):
    wanted = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    assert read(content=None, tool_calls=[call("f", given)])["tool_calls"] == wanted
    assert read(content=None, tool_calls=[{"name": "f", "arguments": given}])["tool_calls"] == wanted
    assert read(content=None, function_call={"name": "f", "arguments": given})["tool_calls"] == wanted


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([call("f", "{city: Rome}")], r"tool call 0 \(f\): the text of its arguments is no JSON"),
        ([call("f", "[1]")], r"tool call 0 \(f\) has arguments of type list"),
        ([call("f", '"{}"')], "arguments of type str"),
        ([call("f", 3)], "arguments of type int"),
        ([call("", {})], "tool call 0 is"),
        ([{"type": "function"}], "tool call 0 is"),
        (["f()"], "tool call 0 is"),
        ("[{", "tool_calls is no JSON"),
        ({"name": "f"}, "tool_calls of type dict"),
    ],
)
def test_calls_of_another_form_are_refused(calls, message):
    with pytest.raises(DatasetError, match=rf"Message 0 \(role 'assistant'\).*{message}"):
        read(content=None, tool_calls=calls)


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({}, None),
        ({"weight": 1}, None),
        ({"weight": 0}, 0),
        ({"weight": 0.0}, 0),
        ({"weight": None}, None),
        ({"train": False}, 0),
        ({"training": False}, 0),
        ({"train": True, "weight": 1}, None),
    ],
)
def test_weights(keys, weight):
    assert read(content="a", **keys).get("weight") == weight
    assert to_chatml([{"from": "gpt", "value": "a", **keys}])[0].get("weight") == weight


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "assistant", "weight": 0.5}, "weight=0.5"),
        ({"role": "assistant", "weight": "0"}, "weight='0'"),
        ({"role": "assistant", "train": "no"}, "train='no'"),
        ({"role": "assistant", "weight": 0, "train": True}, "contradict"),
        ({"role": "user", "weight": 1}, "only an assistant's messages are trained"),
        ({"role": "assistant", "train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}, "train_detail"),
    ],
)
def test_other_weights_are_refused(message, named):
    with pytest.raises(DatasetError, match=named):
        to_chatml([{"content": "a", **message}])


def test_a_conversation_may_be_json_text_but_no_other_text():
    wanted = [{"role": "user", "content": "q"}]
    assert conversation_of({"messages": '[{"role": "user", "content": "q"}]'}) == wanted
    assert conversation_of({"messages": None, "conversations": [{"from": "human", "value": "q"}]}) == wanted
    for text in ("hi", "[{'role': 'user'}]"):
        with pytest.raises(DatasetError, match="Column 'messages' is no JSON"):
            conversation_of({"messages": text})
    with pytest.raises(DatasetError, match="Column 'messages' holds dict"):
        conversation_of({"messages": '{"role": "user"}'})


# ---- What Arrow fills in --------------------------------------------------------------------------------------------


def arguments_of(row):
    return [c["function"]["arguments"] for m in row["messages"] for c in m.get("tool_calls") or ()]


def asks(*calls):
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": list(calls)}]


def schema(name, properties, **keys):
    parameters = {"type": "object", "properties": properties, **keys}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture
def from_parquet(tmp_path):
    """Rows as they come back from a Parquet file, with the features of the dataset."""

    def write(rows):
        Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
        dataset = load_dataset(
            "parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path / "cache")
        )
        return [without_filling(row, dataset.features) for row in dataset]

    return write


def test_keys_of_other_rows_go_from_arguments(from_parquet):
    calls = call("f", {"city": "Rome"}), call("g", {"a": 1, "b": {"c": [None, 2]}})
    rows = [{"messages": asks(one)} for one in calls]
    first, second = from_parquet(rows)
    assert arguments_of(first) == [{"city": "Rome"}]
    assert arguments_of(second) == [{"a": 1, "b": {"c": [None, 2]}}]
    assert first["messages"][0] == {"role": "user", "content": "q"}


def test_keys_of_other_calls_of_a_row_go_and_empty_arguments_stay_empty(from_parquet):
    row = {"messages": asks(call("f", {"city": "Rome"}), call("g", {"n": {"x": 1}}), call("h", {}))}
    assert arguments_of(from_parquet([row])[0]) == [{"city": "Rome"}, {"n": {"x": 1}}, {}]


def test_a_required_argument_that_may_be_null_keeps_it(from_parquet):
    nullable = {"type": ["string", "null"]}
    tools = [schema("f", {"city": nullable, "unit": nullable, "day": {"type": "string"}}, required=["city", "day"])]
    rows = [
        {"messages": asks(call("f", {"city": None, "day": "x"})), "tools": tools},
        {"messages": asks(call("f", {"city": "Rome", "unit": "C", "day": "x"})), "tools": tools},
    ]
    assert [arguments_of(row) for row in from_parquet(rows)] == [
        [{"city": None, "day": "x"}],
        [{"city": "Rome", "unit": "C", "day": "x"}],
    ]


def test_schemas_lose_what_arrow_added_and_keep_their_own_nulls(from_parquet):
    limit = {"type": "integer", "nullable": True, "default": None}
    unit = {"type": "string", "enum": ["C", None], "default": None}
    either = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    tools = [
        schema("f", {"limit": limit, "unit": unit}),
        schema("g", {"either": either, "limit": {"type": "integer", "description": "at most"}}),
    ]
    others = [schema("h", {"limit": {"default": 10}})]
    rows = [{"messages": asks(), "tools": tools}, {"messages": asks(), "tools": others}]
    first, second = from_parquet(rows)
    assert first["tools"] == tools
    assert second["tools"] == rows[1]["tools"]


def test_a_default_that_is_null_in_every_row_was_written(from_parquet):
    tools = [schema("f", {"limit": {"type": "integer", "default": None}})]
    assert from_parquet([{"messages": asks(), "tools": tools}])[0]["tools"] == tools


def test_text_and_json_columns_keep_every_null(tmp_path):
    import json

    rows = [{"messages": asks(call("f", {"city": None}))}, {"messages": asks(call("g", {"a": 1}))}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    read_rows = [without_filling(row, dataset.features) for row in dataset]
    kept = str(dataset.features).count("Json")  # older versions of datasets have structs
    assert arguments_of(read_rows[0]) == [{"city": None}] if kept else [{}]
    text = '[{"type": "function", "function": {"name": "f", "parameters": {"default": null}}}]'
    assert without_filling({"tools": text})["tools"] == text
