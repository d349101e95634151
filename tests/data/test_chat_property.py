"""Random conversations by every chat template that TRL ships: assistants' texts are trained whole, nothing else is."""

import json
import re
from itertools import groupby
from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from distill_trainers.data.labels import IGNORED
from distill_trainers.data.rows import tokenize_row
from distill_trainers.exceptions import DatasetError

TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
# What these templates write behind the prompt is not what follows it where an answer has no thinking.
OPEN_THOUGHT = re.compile("deepseek|nemotron")

SPECIAL = r"<\|[^|{}'\" ]+\|?>|<[^|{}'\" /]+\|>|<｜[^｜{}']+｜>|<(?:start|end)_of_\w+>"

# Characters that no assistant writes tell whose text was trained.
MARKS = {"system": "Σ", "user": "Ω", "tool": "Ψ"}
LETTERS = st.text(st.sampled_from("abz 09\n\t\"'\\<>&{}[]é日.,:"), max_size=12)
THOUGHTS = st.sampled_from(["none", "none", "none", "reasoning_content", "text"])


@st.composite
def conversations(draw, tools=True):
    """Messages, each with its number in its text: `3a` begins the fourth, an assistant's."""
    messages = []

    def say(role, mark, **keys):
        text = f"{len(messages)}{mark}{draw(LETTERS)}"
        messages.append({"role": role, "content": text, **keys})

    if draw(st.booleans()):
        say(draw(st.sampled_from(["system", "system", "developer"])), MARKS["system"])
    for _ in range(draw(st.integers(1, 3))):
        say("user", MARKS["user"])
        if tools and draw(st.integers(0, 3)) == 0:
            number = len(messages)
            arguments = {"city": f"{number}c{draw(LETTERS)}", "days": draw(st.integers(0, 99))}
            given = json.dumps(arguments) if draw(st.booleans()) else arguments
            call = {"id": "callabcde", "type": "function", "function": {"name": f"call_{number}", "arguments": given}}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            say("tool", MARKS["tool"], name=f"call_{number}", tool_call_id="callabcde")
        say("assistant", "a")
        thought = draw(THOUGHTS)
        if thought == "text":
            messages[-1]["content"] = f"<think>\n{len(messages) - 1}t\n</think>\n\n{messages[-1]['content']}"
        elif thought != "none":
            messages[-1][thought] = f"{len(messages) - 1}t{draw(LETTERS)}"
        if draw(st.integers(0, 4)) == 0:
            messages[-1]["weight"] = 0
    if draw(st.integers(0, 3)) == 0:
        messages = [{**m, "content": m["content"] and [{"type": "text", "text": m["content"]}]} for m in messages]
    return messages


@pytest.fixture(scope="module")
def tokenizer_of(make_tokenizer):
    """A byte-level tokenizer for which what looks like a special token of the template is one."""
    made = {}

    def make(name):
        if name not in made:
            source = TEMPLATES[name].read_text(encoding="utf-8")
            tokenizer = make_tokenizer(bos=True, template=source)
            special = set(re.findall(SPECIAL, source))
            tokenizer.add_tokens([AddedToken(text, special=True) for text in sorted(special)], special_tokens=True)
            tokenizer.name_or_path = name
            made[name] = tokenizer
        return made[name]

    return make


def header_of(tokenizer):
    """What opens an assistant's turn, its first line."""

    def asked(content, on):
        ask = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=on)

    content = "Why?" if "Why?" in asked("Why?", False) else [{"type": "text", "text": "Why?"}]
    return asked(content, True).removeprefix(asked(content, False)).split("\n")[0]


def text_of(message):
    content = message["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def wanted_of(message):
    """All that must be trained of a message, as people wrote it."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    texts = [call["name"] for call in calls]
    for call in calls:
        arguments = call["arguments"]
        texts.append((json.loads(arguments) if isinstance(arguments, str) else arguments)["city"])
    thought, _, answer = text_of(message).rpartition("</think>")
    thoughts = thought.replace("<think>", ""), message.get("reasoning_content", "")
    return [text.strip() for text in (*thoughts, answer, *texts)]


def spelled(text, where):
    """Whether `where` says `text`, but for the characters by which languages escape others."""
    plain, plain_where = (
        re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), some).replace("\\n", "\n").replace("\\t", "\t")
        for some in (text, where)
    )
    return text in where or plain.replace("\\", "") in plain_where.replace("\\", "")


def check(name, tokenizer, messages, all_turns):
    """Tell whether the row was trained on, and if so, that it was done rightly."""
    try:
        row = tokenize_row({"messages": messages}, tokenizer, dataset_type="messages", assistant_only_loss=all_turns)
    except DatasetError as error:
        assert re.search("chat template|cannot locate", str(error)), error
        return False
    ids, labels = row["input_ids"], row["labels"]
    stretches, end = [], 0
    for on, run in groupby(label != IGNORED for label in labels):
        start, end = end, end + len(list(run))
        if on:
            stretches.append(tokenizer.decode(ids[start:end]))
    trained = "\n".join(stretches)
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
    assert not set(trained) & set(MARKS.values()), f"another role's text is trained: {trained!r}"
    header = header_of(tokenizer)
    assert not any(header and text.startswith(header) for text in stretches), f"a header is trained: {trained!r}"
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
    answers = answers if all_turns else answers[-1:]
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i in answers:
            for text in wanted_of(message):
                assert spelled(text, trained), f"{text!r} of message {i} is not trained whole: {trained!r}"
        elif message["role"] == "assistant" and answers:
            assert f"{i}a" not in trained and f"call_{i}" not in trained, f"message {i} is trained: {trained!r}"
    if not answers:
        assert not trained
    return True


def run(name, tokenizer_of, examples):
    """How many conversations were not refused."""
    tokenizer, trained = tokenizer_of(name), []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(conversations(), st.booleans())
    def holds(messages, all_turns):
        trained.append(check(name, tokenizer, messages, all_turns))

    holds()
    return sum(trained)


@pytest.mark.parametrize("name", TEMPLATES)
def test_assistants_are_trained_whole_and_nobody_else(name, tokenizer_of):
    run(name, tokenizer_of, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_assistants_are_trained_whole_and_nobody_else_many_times(name, tokenizer_of):
    assert run(name, tokenizer_of, 50) > 0, "every conversation is refused"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not OPEN_THOUGHT.search(name)])
def test_plain_conversations_are_not_refused(name, tokenizer_of):
    messages = [
        {"role": "user", "content": "0Ω Why?"},
        {"role": "assistant", "content": "1a Because."},
        {"role": "user", "content": "2Ω And <b>this</b>?"},
        {"role": "assistant", "content": "3a No & yes:\n\n  'a' \"b\""},
    ]
    assert check(name, tokenizer_of(name), messages, False)
