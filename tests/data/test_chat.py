"""Whole conversations by real templates: what is trained is what was given, or the row is refused."""

import json
import logging
import re
import signal
import time
from itertools import groupby
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import AddedToken
from trl import chat_template_utils as trl_templates

import distill_trainers
from distill_trainers.data.chat import Chat, close_turn
from distill_trainers.data.formats import detect_dataset_type
from distill_trainers.data.labels import IGNORED
from distill_trainers.data.pairs import prepare_pairs
from distill_trainers.data.rows import tokenize_row
from distill_trainers.data.tokenization import prepare_dataset
from distill_trainers.exceptions import DatasetError
from distill_trainers.trainers import GKDConfig


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def system(text, role="system"):
    return {"role": role, "content": text}


def parts(text):
    return [{"type": "text", "text": text}]


def call(arguments, name="get_weather"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture(scope="module")
def tokenizer_of(make_tokenizer):
    """A byte-level tokenizer with a template that TRL ships, whose special tokens are tokens."""

    def make(name):
        source = getattr(trl_templates, f"{name}_chat_template")
        tokenizer = make_tokenizer(bos=True, template=source)
        special = sorted(set(re.findall(r"<\|[a-z_]+\|>|<｜[^｜{}']+｜>", source)))
        tokenizer.add_tokens([AddedToken(text, special=True) for text in special], special_tokens=True)
        tokenizer.name_or_path = name
        return tokenizer

    return make


def texts(tokenizer, row):
    """The prompt, and what is trained of all the rest and of the prompt, as text."""
    runs = groupby(zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != IGNORED)
    stretches = [tokenizer.decode([token for token, _ in run]) for on, run in runs if on]
    return tokenizer.decode(row["input_ids"][: row["prompt_length"]]), stretches


def prepared(tokenizer, *rows, **settings):
    return list(prepare_dataset(Dataset.from_list(list(rows)), tokenizer, max_length=2000, **settings))


def trained(tokenizer, *rows, **settings):
    dataset = Dataset.from_list(list(rows))
    settings |= {"dataset_type": detect_dataset_type(dataset[0]), "features": dataset.features}
    return [texts(tokenizer, tokenize_row(row, tokenizer, **settings))[1] for row in dataset]


def test_templates_are_applied_in_one_place():
    package = Path(distill_trainers.__file__).parent
    users = {file.name for file in package.rglob("*.py") if ".apply_chat_template(" in file.read_text(encoding="utf-8")}
    assert users == {"chat.py", "turns.py"}  # the second asks for the mask of what the first has checked


# ---- Parts, roles, what templates drop ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        (
            "qwen3",
            "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nA cat.<|im_end|>",
        ),
        ("qwen2_5", "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n", "A cat.<|im_end|>"),
        (
            "llama3",
            "user<|end_header_id|>\n\nWhat is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "A cat.<|eot_id|>",
        ),
        ("gemma", "<bos><start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\n", "A cat.<end_of_turn>"),
        (
            "smolvlm",
            "<|im_start|>User: What is it?<end_of_utterance>\nAssistant:",
            " A cat.<end_of_utterance>\n<|im_end|>",
        ),
    ],
)
def test_parts_and_strings_train_the_same(tokenizer_of, name, prompt, answer):
    tokenizer = tokenizer_of(name)
    for content in (parts, str):
        (row,) = prepared(tokenizer, {"messages": [user(content("What is it?")), assistant(content("A cat."))]})
        assert texts(tokenizer, row)[0].endswith(prompt) and texts(tokenizer, row)[1] == [answer]
        (row,) = prepared(tokenizer, {"prompt": [user(content("What is it?"))]}, needs="prompt")
        assert texts(tokenizer, row)[0].endswith(prompt)


def test_images_are_refused_by_row_and_message(tokenizer_of):
    good = {"messages": [user(parts("q")), assistant(parts("a"))]}
    bad = {"messages": [user([*parts("q"), {"type": "image", "text": None}]), assistant(parts("a"))]}
    with pytest.raises(
        DatasetError, match=r"Row 1 of dataset 'train': Message 0 \(role 'user'\).*part of type 'image'"
    ):
        prepared(tokenizer_of("qwen2_5"), good, bad)


DROPPED = [
    ("qwen2_5", [system("Be brief.", "developer"), user("q"), assistant("a")], 0, "name the role 'system'"),
    ("qwen2_5", [user("q"), assistant("b"), system("42", "ipython"), assistant("a")], 2, "name the role 'tool'"),
    ("qwen2_5", [user("q"), assistant("b"), system("q", "User"), assistant("a")], 2, "name the role 'user'"),
    (
        "deepseek_r1_distill",
        [system("One"), system("Two"), user("q"), assistant("<think>\n</think>a")],
        0,
        "user's next",
    ),
    ("glm4moe", [system("a", "developer"), user("q"), assistant("a")], 0, "name the role 'system'"),
]


@pytest.mark.parametrize(("name", "messages", "number", "remedy"), DROPPED)
def test_a_dropped_message_is_refused_with_a_remedy_that_works(tokenizer_of, name, messages, number, remedy):
    tokenizer = tokenizer_of(name)
    role = messages[number]["role"]
    problem = rf"Row 0 of dataset 'train': The chat .* '{name}' loses the text of message {number} \(role '{role}'"
    with pytest.raises(DatasetError, match=rf"{problem}.*{re.escape(remedy)}"):
        prepared(tokenizer, {"messages": messages})
    mended = [dict(message) for message in messages]
    if "role" in remedy:
        mended[number]["role"] = remedy.split("'")[1]
    else:
        first = mended.pop(0)
        mended[1]["content"] = f"{first['content']}\n\n{mended[1]['content']}"
    assert trained(tokenizer, {"messages": mended})


def test_a_short_text_that_stands_elsewhere_is_missed_all_the_same(tokenizer_of):
    # "a" is in "assistant", "1" in the answer: only its place in the template tells that the message is gone.
    for text in ("a", "1", "user"):
        with pytest.raises(DatasetError, match="loses the text of message 0"):
            messages = [system(text, "developer"), user("a1"), assistant("1 a user")]
            prepared(tokenizer_of("qwen2_5"), {"messages": messages})


def test_a_system_prompt_that_a_template_ignores_is_refused(make_tokenizer):
    ignores = (
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(DatasetError, match=r"message 0 \(role 'system'\).*put its text into the user's next message"):
        prepared(make_tokenizer(template=ignores), {"messages": [system("Be brief."), user("q"), assistant("a")]})


def test_a_python_repr_is_no_rendering(make_tokenizer):
    # `~` writes any value, a list as Python shows it: parts are joined before, so nothing of the list is left.
    tokenizer = make_tokenizer(
        template="{% for m in messages %}[{{ m.role }}]{{ '' ~ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert trained(tokenizer, {"messages": [user(parts("q")), assistant(parts("it's"))]}) == [["it's<|im_end|>"]]


@pytest.mark.parametrize("shown", ["m.content", "m.content | tojson"])
def test_a_list_that_is_shown_is_not_read(make_tokenizer, shown):
    tokenizer = make_tokenizer(
        template="{% for m in messages %}[{{ m.role }}]{% if m.content is not string %}{{ SHOWN }}{% endif %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}".replace("SHOWN", shown)
    )
    with pytest.raises(DatasetError, match="Row 0.*loses the text of message 0"):
        prepared(tokenizer, {"messages": [user("q"), assistant("a")]})


def test_an_empty_result_of_a_tool_is_no_loss(tokenizer_of):
    messages = [user("q"), assistant(None, tool_calls=[call({"a": 1})]), system("", "tool"), assistant("Sunny.")]
    assert trained(tokenizer_of("qwen2_5"), {"messages": messages}) == [["Sunny.<|im_end|>"]]


def test_templates_may_trim_and_encode(make_tokenizer):
    tokenizer = make_tokenizer(
        template="{% for m in messages %}{{ {'role': m.role, 'content': m.content} | tojson }}<|im_end|>{% endfor %}"
        '{% if add_generation_prompt %}{"role": "assistant", "content": "{% endif %}'
    )
    (stretch,) = trained(tokenizer, {"messages": [user(' "é"\n<b> '), assistant('a "b"\t\\ ')]})
    assert stretch == [json.dumps('a "b"\t\\ ')[1:] + "}<|im_end|>"]


def test_the_text_of_bos_in_a_message_makes_no_second_one(make_tokenizer):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = make_tokenizer(bos=True, template=template)
    text = Chat(tokenizer).conversation([user("<bos>q"), assistant("a")])
    assert text == "<bos>q<|im_end|>a<|im_end|>"


@pytest.mark.parametrize("answer", ["4<|im_end|>", "4<|im_end|>\n", "4"])
def test_an_answer_that_brings_its_end_has_one(tokenizer_of, answer):
    assert trained(tokenizer_of("qwen2_5"), {"messages": [user("2+2"), assistant(answer)]}) == [["4<|im_end|>"]]


def test_an_answer_may_be_nothing_but_its_end(tokenizer_of):
    tokenizer = tokenizer_of("qwen2_5")
    end = tokenizer.eos_token_id
    assert close_turn(tokenizer, [end, end]) == close_turn(tokenizer, [end]) == [end]


# ---- Tools ----------------------------------------------------------------------------------------------------------

ASKS = user("How is Rome?")
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS}}]
CALLS = {
    "qwen2_5": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome é"}}\n</tool_call><|im_end|>',
    "llama3_1": '{"name": "get_weather", "parameters": {"city": "Rome é"}}<|eot_id|>',
    "gptoss": ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome é"}<|call|>',
    "qwen3_5_think": "\n</think>\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nRome é\n</parameter>\n"
    "</function>\n</tool_call><|im_end|>",
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("arguments", [{"city": "Rome é"}, '{"city": "Rome é"}', '{"city": "Rome \\u00e9"}'])
def test_calls_are_rendered_once_encoded(tokenizer_of, name, arguments):
    row = {"messages": [ASKS, assistant(None, tool_calls=[call(arguments)])], "tools": json.dumps(TOOLS)}
    (stretches,) = trained(tokenizer_of(name), row)
    assert stretches == [CALLS[name]]


def test_keys_that_arrow_added_are_not_trained(tokenizer_of):
    rows = [
        {"messages": [ASKS, assistant(None, tool_calls=[call({"city": "Rome é"})])]},
        {"messages": [ASKS, assistant(None, tool_calls=[call({"a": 1, "b": None}, "other")])]},
        {"messages": [ASKS, assistant("No call.")]},
    ]
    for name in ("qwen2_5", "llama3_1", "gptoss"):
        first, second, third = trained(tokenizer_of(name), *rows)
        assert first[0].startswith(CALLS[name])
        assert '{"a": 1}' in second[0] and "null" not in second[0]
        assert "No call." in third[0]


def test_arguments_that_the_template_wants_as_text_become_text(make_tokenizer):
    tokenizer = make_tokenizer(
        template="{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + '(' + c.function.arguments + ')' }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    for arguments in ({"city": "é"}, '{"city": "é"}'):
        row = {"messages": [ASKS, assistant(None, tool_calls=[call(arguments)])]}
        assert trained(tokenizer, row) == [['get_weather({"city": "é"})<|im_end|>']]


def test_a_result_that_is_no_text_is_json(tokenizer_of):
    calls = assistant(None, tool_calls=[call({"city": "Rome"})])
    messages = [ASKS, calls, {"role": "tool", "content": {"sky": "é"}}, assistant("a")]
    row = tokenize_row({"messages": messages}, tokenizer_of("qwen2_5"), dataset_type="messages")
    prompt = texts(tokenizer_of("qwen2_5"), row)[0]
    assert '<tool_response>\n{"sky": "é"}\n</tool_response>' in prompt and '{"city": "Rome"}' in prompt
    row = tokenize_row({"messages": messages}, tokenizer_of("llama3_1"), dataset_type="messages")
    assert '\n\n{"sky": "é"}<|eot_id|>' in texts(tokenizer_of("llama3_1"), row)[0]


@pytest.mark.parametrize("name", ["cohere2", "gemma3", "llama3"])
def test_calls_and_tools_that_a_template_does_not_know_are_refused(tokenizer_of, name):
    messages = [ASKS, assistant("I look.", tool_calls=[call({"city": "Rome"})])]
    with pytest.raises(DatasetError, match=r"Row 0.*loses the tool call of message 1 .*: 'get_weather'"):
        prepared(tokenizer_of(name), {"messages": messages})
    with pytest.raises(DatasetError, match="Row 0.*does not render the function 'get_weather' of `tools`"):
        prepared(tokenizer_of(name), {"messages": [ASKS, assistant("a")], "tools": json.dumps(TOOLS)})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tools": "[{"}, "Column 'tools' is no JSON"),
        ({"tools": '{"name": "f"}'}, "Column 'tools' holds dict"),
        ({"tools": "[1]"}, "Column 'tools' holds list"),
        ({"tools": ["{"]}, "Tool 0 is no JSON"),
        ({"tools": 3}, "Column 'tools' holds int"),
        ({"chat_template_kwargs": "enable_thinking"}, "Column 'chat_template_kwargs' is no JSON"),
        ({"chat_template_kwargs": "[1]"}, "Column 'chat_template_kwargs' holds list"),
    ],
)
def test_broken_settings_of_a_row_name_it(tokenizer_of, keys, message):
    chat = {"messages": [user("q"), assistant("a")]}
    with pytest.raises(DatasetError, match=f"Row 1 of dataset 'train': {message}.*[Mm]end the"):
        empty = {key: type(value)() for key, value in keys.items()}
        prepared(tokenizer_of("qwen3"), {**chat, **empty}, {**chat, **keys})


def test_tools_may_be_texts_in_a_list(tokenizer_of):
    tokenizer = tokenizer_of("qwen2_5")
    messages = [ASKS, assistant("a")]
    given = (json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS], TOOLS)
    rows = [prepared(tokenizer, {"messages": messages, "tools": tools})[0]["input_ids"] for tools in given]
    assert rows[0] == rows[1] == rows[2]


# ---- What is answered, what is trained ------------------------------------------------------------------------------

ENDS_WITH_USER = [user("one"), assistant("two"), user("three")]


def test_on_policy_a_conversation_that_ends_with_the_user_is_answered(tokenizer_of):
    tokenizer = tokenizer_of("qwen2_5")
    end = "two<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    for row in ({"messages": ENDS_WITH_USER}, {"prompt": ENDS_WITH_USER}, {"prompt": [*ENDS_WITH_USER]}):
        (row,) = prepared(tokenizer, row, needs="prompt")
        assert texts(tokenizer, row)[0].endswith(end) and row["prompt_length"] == len(row["input_ids"])
    messages = [ASKS, assistant(None, tool_calls=[call({"city": "Rome"})]), system("sunny", "tool")]
    (row,) = prepared(tokenizer, {"messages": messages}, needs="prompt")
    assert "sunny" in texts(tokenizer, row)[0]


@pytest.mark.parametrize(("lmbda", "asked"), [(1.0, "three"), (0.0, "one")])
def test_the_share_of_rollouts_says_which_question_is_answered(tokenizer_of, tmp_path, lmbda, asked):
    tokenizer = tokenizer_of("qwen2_5")
    config = GKDConfig(output_dir=str(tmp_path), lmbda=lmbda, max_length=1000, max_new_tokens=8, use_cpu=True)
    dataset = Dataset.from_list([{"messages": ENDS_WITH_USER}])
    (row,) = config.prepare_rows(dataset, tokenizer, "train", config.requirements(dataset[0]))
    assert texts(tokenizer, row)[0].endswith(f"{asked}<|im_end|>\n<|im_start|>assistant\n")


def test_on_policy_a_begun_answer_is_gone_on_with_and_an_answer_is_left_out(tokenizer_of):
    tokenizer = tokenizer_of("qwen2_5")
    (row,) = prepared(tokenizer, {"prompt": [user("2+2"), assistant("It is")]}, needs="prompt")
    assert texts(tokenizer, row)[0].endswith("<|im_start|>assistant\nIt is")
    (row,) = prepared(tokenizer, {"messages": [user("2+2"), assistant("It is")]}, needs="prompt")
    assert texts(tokenizer, row)[0].endswith("2+2<|im_end|>\n<|im_start|>assistant\n")


def test_off_policy_what_follows_the_last_answer_is_said_to_be_left_out(tokenizer_of, caplog):
    tokenizer = tokenizer_of("qwen2_5")
    with caplog.at_level(logging.WARNING):
        rows = prepared(tokenizer, {"messages": ENDS_WITH_USER}, {"messages": ENDS_WITH_USER[:2]})
    assert [texts(tokenizer, row)[1] for row in rows] == [["two<|im_end|>"]] * 2
    assert "1 conversations go on after their last answer" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # as JSON text, too
        prepared(tokenizer, {"messages": json.dumps(ENDS_WITH_USER)})
    assert "1 conversations go on after their last answer" in caplog.text


WEIGHTED = [user("1"), assistant("bad", weight=0), user("2"), assistant("good", weight=1)]


@pytest.mark.parametrize("all_turns", [False, True])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "deepseek_r1_distill"])
def test_a_message_of_weight_0_is_not_trained(tokenizer_of, name, all_turns):
    tokenizer = tokenizer_of(name)

    def trains(*messages):
        row = {"messages": list(messages)}
        row = tokenize_row(row, tokenizer, dataset_type="messages", assistant_only_loss=all_turns)
        return "|".join(texts(tokenizer, row)[1])

    thought = "<think>\n\n</think>\n\n"
    one, two = assistant(f"{thought}first"), assistant(f"{thought}second")
    assert ("first" in trains(user("1"), one, user("2"), two)) == all_turns
    without = trains(user("1"), {**one, "weight": 0}, user("2"), two)
    assert "first" not in without and "second" in without
    without = trains(user("1"), one, user("2"), {**two, "train": False})
    assert "first" in without and "second" not in without
    assert not trains(user("1"), {**one, "weight": 0}, user("2"), {**two, "weight": 0})


def test_weights_in_completions_pairs_and_sharegpt(tokenizer_of):
    tokenizer = tokenizer_of("qwen2_5")
    row = {"prompt": [user("q")], "completion": [assistant("bad", weight=0), user("no"), assistant("good")]}
    assert trained(tokenizer, row) == [["good<|im_end|>"]]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad", "weight": 0}]
    turns += [{"from": "human", "value": "no"}, {"from": "gpt", "value": "good", "weight": 1}]
    assert trained(tokenizer, {"conversations": turns}, assistant_only_loss=True) == [["good<|im_end|>"]]
    chosen = [assistant("a", weight=0), user("no"), assistant("b")]
    pair = {"prompt": [user("q")], "chosen": chosen, "rejected": [assistant("c")]}
    (row,) = prepare_pairs(Dataset.from_list([pair]), tokenizer, max_length=1000)
    assert texts(tokenizer, row)[1] == ["b<|im_end|>"]


def test_a_row_of_weight_0_alone_is_dropped_and_counted(tokenizer_of, caplog):
    rows = [{"messages": [user("q"), assistant("a", weight=0)]}, {"messages": WEIGHTED}]
    with caplog.at_level(logging.WARNING):
        (row,) = prepared(tokenizer_of("qwen2_5"), *rows)
    assert texts(tokenizer_of("qwen2_5"), row)[1] == ["good<|im_end|>"]
    assert "1 no trained token" in caplog.text


def test_pairs_of_messages_are_checked_too(tokenizer_of):
    prompt = [system("Be brief.", "developer"), user("q")]
    pair = {"prompt": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]}
    with pytest.raises(DatasetError, match=r"Row 0 of dataset 'train'.*loses the text of message 0 \(role 'developer'"):
        prepare_pairs(Dataset.from_list([pair]), tokenizer_of("qwen2_5"), max_length=100)


# ---- Thinking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        assistant("<think>\nhm\n</think>\n\n4"),
        assistant("<think>hm</think>4"),
        assistant("4", reasoning_content="hm"),
        assistant("4", thinking="hm"),
    ],
)
def test_deepseeks_thinking_is_trained_by_trls_template(tokenizer_of, answer, caplog):
    tokenizer = tokenizer_of("deepseek_r1_distill")
    (row,) = prepared(tokenizer, {"messages": [user("2+2"), answer]})
    prompt, stretches = texts(tokenizer, row)
    assert prompt == "<bos><｜User｜>2+2<｜Assistant｜><think>\n"
    assert stretches == ["hm\n</think>\n\n4<｜end▁of▁sentence｜>"]


def test_deepseeks_history_has_no_trained_headers(tokenizer_of):
    tokenizer = tokenizer_of("deepseek_r1_distill")
    answers = [assistant(f"<think>\n{i}t\n</think>\n\n{i}a") for i in range(2)]
    row = {"messages": [user("p"), answers[0], user("q"), answers[1]]}
    ends = [f"{i}t\n</think>\n\n{i}a<｜end▁of▁sentence｜>" for i in range(2)]
    assert trained(tokenizer, row, assistant_only_loss=True) == [ends]


def test_an_answer_without_thinking_names_the_one_remedy_and_it_works(tokenizer_of):
    tokenizer = tokenizer_of("deepseek_r1_distill")
    with pytest.raises(DatasetError, match="Row 0.*renders the prompt differently") as caught:
        prepared(tokenizer, {"messages": [user("2+2"), assistant("4")]})
    assert "begin the answers with their thinking" in str(caught.value) and "enable_thinking" not in str(caught.value)
    without = re.search(r"\((['\"].*['\"]) where there is none\)", str(caught.value)).group(1).strip("'")
    answer = without.encode().decode("unicode_escape") + "4"
    assert answer == "<think>\n\n</think>\n\n4"
    ((stretch,),) = trained(tokenizer, {"messages": [user("2+2"), assistant(answer)]})
    assert stretch == "\n</think>\n\n4<｜end▁of▁sentence｜>"


def test_a_switch_is_named_where_it_helps(tokenizer_of):
    tokenizer = tokenizer_of("nemotron_3_nano")
    row = {"messages": [user("2+2"), assistant("4")]}
    with pytest.raises(DatasetError, match=r"What helps: set chat_template_kwargs to \{enable_thinking: false\}"):
        prepared(tokenizer, row)
    assert "4" in trained(tokenizer, row, chat_template_kwargs={"enable_thinking": False})[0][0]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_that_the_template_ignores_is_refused_where_it_is_trained(tokenizer_of, key):
    tokenizer = tokenizer_of("qwen2_5")
    row = {"messages": [user("2+2"), assistant("4", **{key: "two twos"})]}
    with pytest.raises(DatasetError, match=r"the thinking of message 1.*put the thinking into content.*or remove"):
        prepared(tokenizer, row)
    row = {"messages": [user("2+2"), assistant("<think>\ntwo twos\n</think>\n\n4")]}
    assert trained(tokenizer, row) == [["<think>\ntwo twos\n</think>\n\n4<|im_end|>"]]


def test_templates_may_drop_what_earlier_turns_thought_unless_it_is_trained(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    row = {"messages": [user("p"), assistant("x", reasoning_content="why"), user("q"), assistant("y")]}
    assert "why" not in texts(tokenizer, prepared(tokenizer, row)[0])[0]
    first, second = trained(tokenizer, row, assistant_only_loss=True)[0]
    assert first == "<think>\nwhy\n</think>\n\nx<|im_end|>" and second.endswith("y<|im_end|>")


@pytest.mark.parametrize("text", ["Zoé", "日本", "yes 🙂"])
def test_the_last_character_of_a_marked_turn_is_trained_whole(make_tokenizer, text):
    """It is several bytes, and so several tokens; transformers marks the first of them."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template=template)
    row = {"messages": [user("a"), assistant(text), user("b"), assistant("c")]}
    ids = tokenize_row(row, tokenizer, dataset_type="messages", assistant_only_loss=True)
    first = next(list(group) for on, group in groupby(ids["labels"], lambda label: label != IGNORED) if on)
    assert tokenizer.decode(first) == text


# ---- Hostile templates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",  # no loop of Python's
        "{% for c in messages[0].content * 99999 %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_an_endless_template_is_ended(make_tokenizer, monkeypatch, template):
    monkeypatch.setattr("distill_trainers.data.deadline.SECONDS", 0.3)
    before, started = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(DatasetError, match=r"did not render one conversation within 0\.3 s"):
        prepared(make_tokenizer(template=template), {"messages": [user("a"), assistant("b")]})
    assert time.monotonic() - started < 5  # no other form of the messages is tried
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_without_alarms_a_template_has_no_deadline(make_tokenizer, monkeypatch):
    monkeypatch.delattr(signal, "SIGALRM")  # as on Windows
    monkeypatch.delattr(signal, "setitimer")
    assert prepared(make_tokenizer(), {"messages": [user("a"), assistant("b")]})


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].system('touch executed') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('touch executed') }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__ }}{{ '{0.__class__.__init__}'.format(messages) }}",
    ],
)
def test_a_template_reaches_nothing_but_messages(make_tokenizer, tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError):
        prepared(make_tokenizer(template=template), {"messages": [user("a"), assistant("b")]})
    assert not list(tmp_path.iterdir())
