"""One message as people write it to one that chat templates read: text, tool calls as mappings, weight 0 or none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from distill_trainers.exceptions import DatasetError

Message = dict[str, Any]

# Names under which datasets keep what an assistant thought before it spoke.
THINKING = ("reasoning_content", "reasoning", "thinking")

# OpenAI's Responses API names the direction of a text; the rest call it text.
_TEXT_PARTS = ("text", "input_text", "output_text")
# OpenAI and ShareGPT write a number, Axolotl and ms-swift a truth value.
_WEIGHTS = ("weight", "train", "training", "loss")
_DETAILS = ("train_detail", "training_detail")
_NOT_TEXT = {"role", "name", "id", "tool_call_id", "type"}


def read_message(message: Mapping[str, Any], number: int) -> Message:
    """Bring a message with a role into the form of chat templates; the input stays as it was.

    Parts of text are joined, tool calls become `{type, function: {name, arguments}}` with a mapping of arguments, keys
    without a value go (a table fills them), and `weight` is there only where it is 0.

    Raises:
        DatasetError: something in it that no text stands for, named with the message's number and role.
    """
    given = {key: value for key, value in message.items() if value is not None}
    where = f"Message {number} (role {given['role']!r})"
    read = {key: value for key, value in given.items() if key not in (*_WEIGHTS, "tool_calls", "function_call")}
    for name in THINKING:
        if name in read and not isinstance(read[name], str):
            raise DatasetError(f"{where} has {name} of type {type(read[name]).__name__}, expected text. Make it text.")
    if not _trains(given, where):
        read["weight"] = 0
    calls = _tool_calls(given, where)
    if calls:
        read["tool_calls"] = calls
    read["content"] = _content(given, where, spoken=bool(calls))
    return read


def as_json(value: Any, what: str, expected: str) -> Any:
    """Read text as JSON; what is no text stays as it is.

    Raises:
        DatasetError: broken text, named by `what`.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        shown = f"{what} is no JSON ({error}): {value!r:.80}."
        raise DatasetError(f"{shown} Expected {expected}. Mend the text.") from error


def forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the same messages in the forms that templates read, the most usual one first.

    Text is a string, or a list of one part. A result that is no text, and arguments of a call, are given as they are,
    or as JSON. An assistant that only calls says nothing, or the empty text.
    """
    speechless = any(message["content"] is None for message in messages)
    structured = any(not isinstance(message["content"], str | None) for message in messages)
    calls = any("tool_calls" in message for message in messages)
    for choice in product(*((False, True)[: 1 + both] for both in (True, structured, calls, speechless))):
        yield [_in_form(message, *choice) for message in messages]


def _in_form(message: Message, parts: bool, json_result: bool, json_arguments: bool, blank: bool) -> Message:
    content = message["content"]
    if content is None:
        content = "" if blank else None
    elif json_result and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    if parts and isinstance(content, str) and content:
        content = [{"type": "text", "text": content}]
    formed = {**message, "content": content}
    if json_arguments and "tool_calls" in message:
        functions = [call["function"] for call in message["tool_calls"]]
        texts = [{**f, "arguments": json.dumps(f["arguments"], ensure_ascii=False)} for f in functions]
        calls = zip(message["tool_calls"], texts, strict=True)
        formed["tool_calls"] = [{**call, "function": function} for call, function in calls]
    return formed


def is_trained(message: Mapping[str, Any]) -> bool:
    """Tell whether an assistant's message may be trained: its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _trains(message: Mapping[str, Any], where: str) -> bool:
    for name in _DETAILS:
        if message.get(name):
            raise DatasetError(
                f"{where} has {name}, which marks stretches of a message; a message is trained whole or not at all. "
                "Split it into several messages with `weight` 0 or 1."
            )
    values = {name: message[name] for name in _WEIGHTS if name in message}
    for name, value in values.items():
        if value not in (0, 1):
            raise DatasetError(f"{where} has {name}={value!r}; expected 0 (not trained) or 1 (trained). Set one.")
        if value and message["role"] != "assistant":
            raise DatasetError(
                f"{where} has {name}={value!r}, but only an assistant's messages are trained. Remove {name} there."
            )
    if len({bool(value) for value in values.values()}) > 1:
        raise DatasetError(f"{where} has {values}, which contradict each other. Keep one of them.")
    return all(values.values())


def _content(message: Mapping[str, Any], where: str, *, spoken: bool) -> Any:
    content = message.get("content")
    if content is None or content == "" or content == []:
        other = [key for key, value in message.items() if key not in _NOT_TEXT and value and isinstance(value, str)]
        if other and not spoken and not set(other) <= set(THINKING):
            raise DatasetError(
                f"{where} has no content, but text in {other}. Expected it in `content`: rename the key."
            )
        return None if spoken else ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, str) or _is_part(part) for part in content):
        return "".join(_part(part, where) for part in content)
    if message["role"] == "tool":
        return content  # a result that is no text; `forms` has its JSON
    raise DatasetError(
        f"{where} has content of type {type(content).__name__} ({content!r:.80}); expected text, or a list of parts "
        "{type: text, text}. Convert it with dataset.map."
    )


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and (isinstance(part.get("type"), str) or isinstance(part.get("text"), str))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") or "text"
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise DatasetError(
            f"{where} has a part of type {kind!r} with the keys {sorted(k for k, v in part.items() if v is not None)}; "
            "students and teachers read text alone: {type: text, text}. Remove such rows, or put what the part says "
            "into text."
        )
    return str(part["text"])


def _tool_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    calls = as_json(message.get("tool_calls") or [], f"{where}: tool_calls", "a list of calls")
    legacy = message.get("function_call")  # OpenAI's, before there were several calls
    calls = [*calls, legacy] if isinstance(legacy, Mapping) and isinstance(calls, list) else calls
    if not isinstance(calls, list):
        raise DatasetError(f"{where} has tool_calls of type {type(calls).__name__}, expected a list of calls.")
    return [_tool_call(call, f"{where}, tool call {i}") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = (call.get("function") or call) if isinstance(call, Mapping) else {}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DatasetError(f"{where} is {call!r:.80}; expected {{type: function, function: {{name, arguments}}}}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and not arguments.strip():
        arguments = {}  # how OpenAI writes a call without arguments
    arguments = as_json(arguments or {}, f"{where} ({function['name']}): the text of its arguments", "a JSON object")
    if not isinstance(arguments, Mapping):
        raise DatasetError(
            f"{where} ({function['name']}) has arguments of type {type(arguments).__name__}: {arguments!r:.80}. "
            "Expected a mapping of names to values, or its JSON text. Bring them into that form."
        )
    outer = {} if function is call else {key: value for key, value in call.items() if value is not None}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": dict(arguments)}}
