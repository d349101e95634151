"""Whether values are of the kind that their settings take: YAML reads what it likes, and Python checks nothing."""

from __future__ import annotations

import argparse
import functools
import json
import math
import numbers
import os
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .exceptions import ConfigurationError
from .redaction import hidden
from .settings import Bounds, require, shown

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
# Wider than they are declared.
_ALSO = {"resume_from_checkpoint": bool, "self_teacher": bool}
_LARGEST_FLOAT = 3.4028234e38  # of float32: above it a number is infinite as soon as it meets a tensor
_LARGEST_INT = 2**63 - 1


def check_settings(
    settings: Any,
    *,
    also: Mapping[str, Any] | None = None,
    bounds: Mapping[str, Bounds] | None = None,
    may_be_infinite: Collection[str] = (),
    may_be_blank: Collection[str] = (),
) -> None:
    """Refuse values of a settings dataclass that are of another type than declared, or that no code can work with.

    Args:
        also: types that are taken besides, by field.
        bounds: those of fields that declare none.
        may_be_infinite: fields where infinity means something.
        may_be_blank: fields where text without a word is as good as None.

    Raises:
        ConfigurationError: for the first such value, naming its setting.
    """
    declared = {field.name: field for field in fields(settings) if field.init}
    values = {name: getattr(settings, name) for name in declared}
    check_value_types(values, type(settings), also=also)
    for name, value in values.items():
        if any(isinstance(leaf, numbers.Number) and hasattr(leaf, "item") for leaf in _leaves(value)):
            values[name] = _of_python(value)  # JSON, in which settings are kept, knows no numbers of NumPy
            object.__setattr__(settings, name, values[name])
    check_finite(values, may_be_infinite)
    for name, value in values.items():
        field = declared[name]
        check_bounds(name, value, field.metadata.get("bounds") or (bounds or {}).get(name))
        default = field.default if field.default is not MISSING else None
        if isinstance(value, str) and not value.strip() and value != default and name not in may_be_blank:
            require(False, name, json.dumps(value), "text with a word in it; leave the setting out for its default")
        texts = (leaf for leaf in _leaves(value) if isinstance(leaf, str))
        require(all(map(_is_writable, texts)), name, value, "text in Unicode, without the character NUL")


def _of_python(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _of_python(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_of_python, value))
    return value.item() if hasattr(value, "item") else value


def check_bounds(name: str, value: Any, bounds: Bounds | None) -> None:
    """Refuse a number that lies out of its bounds; what is no number passes.

    Raises:
        ConfigurationError: naming the setting.
    """
    if bounds is not None and isinstance(value, numbers.Real) and not isinstance(value, bool):
        require(bounds.admits(value), name, value, str(bounds))


def check_value_types(
    values: Mapping[str, Any],
    settings: type,
    *,
    text_is_parsed: bool = False,
    also: Mapping[str, Any] | None = None,
) -> None:
    """Compare values with the types that a dataclass declares; names that it does not have are passed over.

    Args:
        values: by the name of their field.
        text_is_parsed: let text through, because a parser is going to turn it into the declared type, or to refuse it.
        also: types that are taken besides, by field.

    Raises:
        ConfigurationError: for the first value of another type, naming its setting.
    """
    hints, more = _hints(settings), {**_ALSO, **(also or {})}
    for name in (f.name for f in fields(settings) if f.init and f.name in values):
        value, hint = values[name], hints[name] | more[name] if name in more else hints[name]
        if _fits(value, hint) or (text_is_parsed and isinstance(value, str)):
            continue
        expected = " or ".join(dict.fromkeys(filter(None, map(_in_words, _parts(hint)))))
        if isinstance(value, bool) and _fits("", hint):
            expected += " (YAML reads no, off, yes and on as false and true: put the word in quotes)"
        elif isinstance(value, (int, float)) and _fits("", hint):
            expected += " (put it in quotes)"
        require(False, name, _as_json(hidden(value, name)), expected or "something else")


def check_finite(values: Mapping[str, Any], may_be_infinite: Collection[str] = ()) -> None:
    """Refuse NaN, infinity where it means nothing, and numbers too large for a tensor, in lists and mappings too.

    Raises:
        ConfigurationError: for the first such number, naming its setting.
    """
    for name, value in values.items():
        for number in (leaf for leaf in _leaves(value) if isinstance(leaf, numbers.Real)):
            if isinstance(number, numbers.Integral):
                require(abs(int(number)) <= _LARGEST_INT, name, value, "a whole number of at most 64 bits")
            elif math.isnan(number) or not (
                abs(float(number)) <= _LARGEST_FLOAT or (math.isinf(number) and name in may_be_infinite)
            ):
                require(False, name, value, "a finite number, such as float32 can hold")


def check_mappings(settings: Any) -> None:
    """Refuse text in place of a mapping that is neither one in JSON nor, where that may be, the name of a file of it.

    Raises:
        ConfigurationError: naming the setting.
    """
    kind: Any = type(settings)
    hints = _hints(kind)
    for name in (f.name for f in fields(settings) if f.init and {dict, str} <= set(_kinds(hints[f.name]))):
        value = getattr(settings, name)
        if not isinstance(value, str) or (not value and name in _MAY_BE_FILES):
            continue
        if not value.lstrip().startswith("{") and name in _MAY_BE_FILES:
            if not os.path.isfile(value):  # false too of names that no file can have
                require(name == "deepspeed", name, value, "a mapping, or a file that holds one in JSON")
                continue  # DeepSpeed's may also be written in base64
            try:
                value = Path(value).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"The file of `{name}`, {shown(value)!r}, cannot be read: {error}.") from error
        try:
            parse_mapping(value)
        except argparse.ArgumentTypeError:
            require(False, name, value, 'a mapping, or one in JSON such as {"key": "value"}')


def _leaves(value: Any) -> Iterator[Any]:
    """What lists and mappings hold at last, keys too; any other value is itself one."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_writable(text: str) -> bool:
    try:
        return b"\0" not in text.encode("utf-8")
    except UnicodeEncodeError:  # half a character, as in "\\ud800"
        return False


def _as_json(value: Any) -> str:
    try:
        if isinstance(value, dict) and any(not isinstance(key, str) for key in value):
            return shown(value)  # JSON would write its keys as text
        return json.dumps(value, default=str) if not isinstance(value, tuple) else f"{value!r}, a tuple"
    except (ValueError, TypeError, RecursionError):  # a number of thousands of digits, keys that are no text, a knot
        return shown(value) if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"


def names_of_mappings(settings: type) -> set[str]:
    """Name the fields that hold a mapping, which may be written as JSON."""
    hints = _hints(settings)
    return {name for name, hint in hints.items() if {dict, str} <= set(_kinds(hint))} - _MAY_BE_FILES


def parse_mapping(text: str) -> dict[str, Any]:
    """Parse a mapping written as JSON; for argparse, which names the option in front of the message."""
    try:
        value = json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'got {shown(text)!r}; expected a mapping, in JSON such as {{"key": "value"}}')
    return value


def _no_json(name: str) -> Any:
    raise ValueError(f"{name}, which Python reads, is no JSON")


@functools.cache
def _hints(settings: Any) -> dict[str, Any]:
    return get_type_hints(settings)


@functools.cache  # each config of a run has two hundred settings, and is checked several times
def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _kinds(hint: Any) -> list[Any]:
    return [get_origin(part) or part for part in _parts(hint)]


def _in_words(hint: Any) -> str:
    kind, inside = get_origin(hint) or hint, get_args(hint)
    numeric = kind is dict and inside[1:] in ((int,), (float,))
    items = {int: " of whole numbers", float: " of numbers", str: " of texts"}
    of = items.get(inside[0], "") if kind is list and inside else ""
    return "a mapping of names to numbers, such as {name: 0.5}" if numeric else _NAMES.get(kind, "") + of


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
    if hint is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(
            _fits(key, inside[0]) and _fits(item, inside[1]) for key, item in value.items()
        )
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real  # those of NumPy are numbers too
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, (str, os.PathLike) if hint is str else hint)
