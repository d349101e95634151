"""Whether values are of the kind that their settings take: YAML reads what it likes, and Python checks nothing."""

from __future__ import annotations

import argparse
import functools
import json
import math
import numbers
import os
import types
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .exceptions import ConfigurationError
from .redaction import hidden

_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}
# Declared as text or a mapping where text names a file; in all others text is a mapping in JSON.
_MAY_BE_FILES = frozenset({"accelerator_config", "fsdp_config", "deepspeed"})
# Wider than transformers declares it.
_ALSO = {"resume_from_checkpoint": bool}


def check_value_types(values: Mapping[str, Any], settings: type, *, text_is_parsed: bool = False) -> None:
    """Compare values with the types that a dataclass declares; names that it does not have are passed over.

    Args:
        values: by the name of their field.
        text_is_parsed: let text through, because a parser is going to turn it into the declared type, or to refuse it.

    Raises:
        ConfigurationError: for the first value of another type, naming its setting.
    """
    hints = _hints(settings)
    for name in (f.name for f in fields(settings) if f.init and f.name in values):
        value, hint = values[name], hints[name] | _ALSO[name] if name in _ALSO else hints[name]
        if _fits(value, hint) or (text_is_parsed and isinstance(value, str)):
            continue
        expected = " or ".join(dict.fromkeys(_NAMES[kind] for kind in _kinds(hint) if kind in _NAMES))
        if isinstance(value, bool) and _fits("", hint):
            expected += " (YAML reads no, off, yes and on as false and true: put the word in quotes)"
        raise ConfigurationError(f"Got `{name}: {json.dumps(hidden(value, name), default=str)}`; expected {expected}.")


def check_finite(values: Mapping[str, Any], may_be_infinite: Collection[str] = ()) -> None:
    """Refuse NaN, and infinity where it means nothing.

    Raises:
        ConfigurationError: for the first such number, naming its setting.
    """
    for name, value in values.items():
        if not isinstance(value, numbers.Real) or math.isfinite(value):
            continue
        if math.isnan(value) or name not in may_be_infinite:
            raise ConfigurationError(f"Got `{name}: {value}`; expected a finite number.")


def names_of_numbers(settings: type) -> set[str]:
    """Name the fields that hold nothing but numbers, true and false."""
    kinds = {int, float, bool, type(None)}
    return {name for name, hint in _hints(settings).items() if kinds.issuperset(_kinds(hint))}


def names_of_mappings(settings: type) -> set[str]:
    """Name the fields that hold a mapping, which may be written as JSON."""
    hints = _hints(settings)
    return {name for name, hint in hints.items() if {dict, str} <= set(_kinds(hint))} - _MAY_BE_FILES


def parse_mapping(text: str) -> dict[str, Any]:
    """Parse a mapping written as JSON; for argparse, which names the option in front of the message."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'got {text!r}; expected a mapping, in JSON such as {{"key": "value"}}')
    return value


@functools.cache
def _hints(settings: type) -> dict[str, Any]:
    return get_type_hints(settings)


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _kinds(hint: Any) -> list[Any]:
    return [get_origin(part) or part for part in _parts(hint)]


def _fits(value: Any, hint: Any) -> bool:
    inside = get_args(hint)
    if hint is Any:
        return True
    if len(parts := _parts(hint)) > 1:
        return any(_fits(value, part) for part in parts)
    if get_origin(hint) is Literal:
        return value in inside
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, inside[0]) for item in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(item, inside[1]) for item in value.values())
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real  # those of NumPy are numbers too
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, (str, os.PathLike) if hint is str else hint)
