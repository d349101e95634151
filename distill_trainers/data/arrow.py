"""What a table has made of values: numbers of names, and keys that it has put into mappings.

Arrow gives all rows of a column the same keys, null where one had none.

What can be known: text and `datasets.Json` columns keep their keys, so a null there is the user's. In a column of
structs a null is taken for Arrow's, but where a JSON schema says that null is a value: a `default` or `const` of a type
that admits null, and an argument that is required and may be null. List items are never added, so `enum` stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CHATS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")


def class_names(row: Mapping[str, Any], features: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the row with names in place of the numbers of `datasets.ClassLabel`, and null where there is no name."""
    named = {column: feature for column, feature in (features or {}).items() if hasattr(feature, "int2str")}
    numbers = {column: row[column] for column in named if isinstance(row.get(column), int)}
    return {**row, **{c: named[c].int2str(number) if number >= 0 else None for c, number in numbers.items()}}


def without_filling(row: Mapping[str, Any], features: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the row without the keys that Arrow added to messages, tool calls and tools.

    Args:
        features: of the dataset, which tell structs from JSON; None: every mapping may have been a struct.
    """
    row, features = dict(row), features or {}
    if isinstance(row.get("tools"), list):
        row["tools"] = _stripped(row["tools"], features.get("tools"))
    schemas = _schemas(row.get("tools"))
    for name, value in row.items():
        if isinstance(value, list) and (name in _CHATS or _speaks(value)):  # others are of the teacher's prompts
            row[name] = [_message(m, _item(features.get(name)), schemas) for m in value]
    return row


def _speaks(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], Mapping) and not {"role", "from"}.isdisjoint(value[0])


def _message(message: Any, feature: Any, schemas: Mapping[str, Any]) -> Any:
    if not isinstance(message, Mapping) or _is_json(feature):
        return message
    calls = message.get("tool_calls")
    stripped = {key: _stripped(value, _member(feature, key)) for key, value in message.items() if key != "tool_calls"}
    if not isinstance(calls, list):
        return stripped if calls is None else {**stripped, "tool_calls": calls}
    of_calls = _item(_member(feature, "tool_calls"))
    return {**stripped, "tool_calls": [_call(call, of_calls, schemas) for call in calls]}


def _call(call: Any, feature: Any, schemas: Mapping[str, Any]) -> Any:
    if not isinstance(call, Mapping) or _is_json(feature):
        return call
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**_stripped(call, feature), "function": _call(function, _member(feature, "function"), schemas)}
    arguments, of_arguments = call.get("arguments"), _member(feature, "arguments")
    if not isinstance(arguments, Mapping) or _is_json(of_arguments):
        return call
    return {**call, "arguments": _arguments(arguments, of_arguments, schemas.get(str(call.get("name")), {}))}


def _arguments(arguments: Mapping[str, Any], feature: Any, schema: Any) -> dict[str, Any]:
    schema = schema if isinstance(schema, Mapping) else {}
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    kept = {}
    for name, value in arguments.items():
        declared = properties.get(name)
        if value is None and not (name in required and _admits_null(declared)):
            continue
        nested = isinstance(value, Mapping) and not _is_json(_member(feature, name))
        kept[name] = (
            _arguments(value, _member(feature, name), declared) if nested else _stripped(value, _member(feature, name))
        )
    return kept


def _stripped(value: Any, feature: Any) -> Any:
    if _is_json(feature):
        return value
    if isinstance(value, list):
        return [_stripped(item, _item(feature)) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: _stripped(item, _member(feature, key))
        for key, item in value.items()
        if item is not None or (key in ("default", "const") and _is_null_value(value, _member(feature, key)))
    }


def _is_null_value(schema: Mapping[str, Any], feature: Any) -> bool:
    # A key that is null in every row was written as null by somebody.
    return _admits_null(schema) or getattr(feature, "dtype", None) == "null"


def _admits_null(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    types = schema.get("type")
    unions = [option for name in ("anyOf", "oneOf") for option in schema.get(name) or []]
    return bool(
        schema.get("nullable")
        or (types == "null" or isinstance(types, list) and "null" in types)
        or None in (schema.get("enum") or [])
        or any(map(_admits_null, unions))
    )


def _schemas(tools: Any) -> dict[str, Any]:
    """The parameters of each function, by its name."""
    tools = tools if isinstance(tools, list) else []
    functions = [tool.get("function") or tool for tool in tools if isinstance(tool, Mapping)]
    return {str(f.get("name")): f.get("parameters") for f in functions if isinstance(f, Mapping)}


def _is_json(feature: Any) -> bool:
    from datasets import Json

    return isinstance(feature, Json)


def _member(feature: Any, key: str) -> Any:
    return feature.get(key) if isinstance(feature, Mapping) else None


def _item(feature: Any) -> Any:
    return feature if _is_json(feature) else getattr(feature, "feature", None)
