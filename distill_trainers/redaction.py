"""Secrets are not shown: told by the names of settings, and by what the text itself looks like. The one place for it.

Errors of this package and the log of its commands go through `redacted`; records, cards, caches and trackers through
`hidden` or `without_secrets`. A name or a shape that is missing is added here, and counts everywhere.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from .escaping import visible

NOT_SHOWN = "(not shown)"
_ENDS = set("""
    apikey auth authorization cookie cookies credential credentials headers jwt passphrase passwd password passwords pat
    proxies proxy pwd secret secrets signature token
""".split())  # fmt: skip
_PAIRS = {(of, "key") for of in "access account api encryption master private secret signing".split()}
_PAIRS |= {(of, f"{what}s") for of, what in _PAIRS} | {("secret", "id"), ("key", "id")}
_PAIRS |= {(of, "tokens") for of in ("access", "api", "auth", "hf", "hub")}
# What stands before `token` in names of special tokens, of units and of counts.
_PLAIN_TOKENS = set("""
    additional answer assistant audio bad begin boa bod boi bos class cls each eoa eod eoi eom eos eot end extra first
    fim image last mask new next no of or out pad padding per prefix role rollout same sep separator single special
    start stop suffix system this tool trained unk unknown user video vision
""".split())  # fmt: skip

# What is one by its look, whatever its name, and what takes its place.
_SHAPES = [
    (r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\Z)", NOT_SHOWN),
    # User and password of an address, whose slashes a path may have merged: with a colon also where the password has
    # slashes; but not `host:port/path@`.
    (r"(?<=:/)(/{0,2})(?!git@)(?!(?:[\w-]+(?:\.[\w-]+)+|localhost):\d{1,5}[/?#])(?:[^\s/@:\"]{0,200}:[^\s\"]{1,500}@|"
     r"[^\s/@\"]{1,500}@|[^\s/@:.\"]{1,200}/[^\s\"]{1,500}@(?=[\w-]+[.:]))", rf"\g<1>{NOT_SHOWN}@"),
    (r"(?i)(?<=%3A%2F%2F)[^\s\"']{1,500}?%40", f"{NOT_SHOWN}%40"),
    (r"(?<![\w/.@:-])[\w.+%-]{1,100}:[^\s/@:'\"`]{3,200}@(?!sha\d)(?=[\w-]+(?:\.[\w-]+|:\d))", f"{NOT_SHOWN}@"),
    (r"\b(?:hf|api_org|gh[opsur]|gsk|r8|npm)_[A-Za-z0-9]{16,}", NOT_SHOWN),
    (r"\b(?:github_pat_|glpat-|gldt-|xox[a-z]-|xapp-|nvapi-|dop_v1_|wandb_v1_)[\w-]{10,}|\bpypi-[\w-]{40,}", NOT_SHOWN),
    (r"(?<![^\W_])[sr]k[-_](?=[\w-]*\d)[\w-]{16,}", NOT_SHOWN),
    (r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bSG\.[\w-]{16,}\.[\w-]{16,}", NOT_SHOWN),
    (r"\beyJ[\w-]{6,}\.[\w-]{6,}(?:\.[\w-]*)?", NOT_SHOWN),
    (r"(?i)\b(authorization(?:\\{0,9}[\"']\s*,|\\{0,9}[\"']?\s*[:=])\s*)(?:b?\\{0,9}[\"'])?"
     r"(?!\(not shown)(?:(?:basic|bearer|digest|token)\s+)?[^\s\"',}\\]+", rf"\g<1>{NOT_SHOWN}"),
    (r"(?i)\b((?:bearer|basic)\s+)(?=[\w~+/.-]{0,200}[\d=])[\w~+/.-]{8,}=*", rf"\g<1>{NOT_SHOWN}"),
    (r"(?i)([?&](?:[\w.-]{0,40}(?:token|secret|password|passwd|pwd|signature|credential|auth|accesskeyid)|api_?key|key|"
     r"sig|code)=)(?!\(not shown)[^\s&#\"'`<>)]+", rf"\g<1>{NOT_SHOWN}"),
]  # fmt: skip
_PATTERNS = [(re.compile(pattern, re.DOTALL), put) for pattern, put in _SHAPES]
# Names that `is_secret` is asked about: others must not swallow a value in which a secret is named.
_NAME = rf"(?>[\w.-]{{1,80}})(?:{'|'.join(f'(?<={end})' for end in sorted(_ENDS | {of for _, of in _PAIRS}))})"
_VALUE = r"""(?:\(not shown\)|\{(?:[^{}]|\{[^{}]*\})*\}|\[[^\[\]]*\]|b?\\{1,9}["'].*?(?:\\["']|$)|"""
_VALUE += r"""b?"(?:[^"\\]|\\.)*(?:"|$)|b?'(?:[^'\\]|\\.)*(?:'|$)|[^\s,;&"'`\]})]+)"""
# `--name value`, `"name": value`, `name=value` and, where a line or a list of settings has it, `name: value`.
_ASSIGNED = re.compile(
    rf"(?:(?P<option>--{_NAME})[ =]|\\{{0,9}}[\"'](?P<quoted>{_NAME})\\{{0,9}}[\"']\s*[:=]\s*|\b(?P<plain>{_NAME})=\s*"
    rf"|(?:(?<=[`{{,(\n])|(?<=\\n)|^)[ \t]{{0,40}}(?P<listed>{_NAME}):\s+)(?P<value>{_VALUE})",
    re.IGNORECASE,
)
_LEAST = 8  # characters of a secret in the environment: shorter ones are words


@functools.cache
def is_secret(name: str) -> bool:
    """Tell whether a setting, key, header or variable of this name holds a secret: `api_key` does, `eos_token` not."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    parts = [part for part in re.split(r"[^a-z0-9]+", words) if part]
    if parts[-1:] == ["token"] and parts[-2:-1] and parts[-2] in _PLAIN_TOKENS:
        return False
    return bool(parts) and (parts[-1] in _ENDS or tuple(parts[-2:]) in _PAIRS)


def redacted(text: str) -> str:
    """Return a text without what looks like a secret: tokens, keys, passwords in addresses, assigned passwords."""
    for value in _in_environment():
        text = text.replace(value, NOT_SHOWN)
    for pattern, put in _PATTERNS:
        text = pattern.sub(put, text)
    return _ASSIGNED.sub(_without_value, text)


def _without_value(found: re.Match[str]) -> str:
    name = next(filter(None, found.group("option", "quoted", "plain", "listed")))
    value = found["value"].strip("\\\"'")
    harmless = value in ("", "None", "null", "True", "False", "true", "false", "{", "[") or value.startswith(NOT_SHOWN)
    if harmless or not is_secret(name) or (found["listed"] is not None and _is_number(value)):
        return found[0]
    return f"{found[0][: found.start('value') - found.start()]}{NOT_SHOWN}"


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).lstrip("-").isdigit()


def _in_environment() -> Iterator[str]:
    """Values of variables such as HF_TOKEN: whoever repeats one, a server say, gives it no shape."""
    for name, value in os.environ.items():
        is_long = len(value) >= _LEAST and not value.isalpha()
        if is_long and is_secret(name) and name != "PWD" and not value.startswith("/") and "proxy" not in name.lower():
            yield value


def hidden(value: Any, name: str = "") -> Any:
    """Return a setting with `(not shown)` in the place of secrets, at any depth; what holds none comes as it is.

    Args:
        name: of the setting.
    """
    if value is None or isinstance(value, bool) or (isinstance(value, str | Mapping | list | tuple) and not value):
        return value
    if is_secret(name):
        return NOT_SHOWN
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {redacted(key) if isinstance(key, str) else key: hidden(value[key], str(key)) for key in value}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):  # a pair of a name and a value
        return (redacted(value[0]), hidden(value[1], value[0]))
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(hidden(item) for item in value)
    if isinstance(value, int | float):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        told = {field.name: getattr(value, field.name, None) for field in fields(value)}
        return value if hidden(told) == told else hidden(told)
    written = str(value)
    return value if redacted(written) == written else redacted(written)


def without_secrets(value: Any) -> Any:
    """Do as `hidden`, but leave settings and keys out that hold nothing else."""
    told = hidden(value)
    if isinstance(told, Mapping):
        return {key: without_secrets(item) for key, item in told.items() if item != NOT_SHOWN}
    return [without_secrets(item) for item in told] if isinstance(told, list) else told


def holds_secret(value: Any, name: str = "") -> bool:
    """Tell whether `hidden` would change a setting."""
    return bool(hidden(value, name) != value)


class Redacting(logging.Filter):
    """Lets a handler write records without secrets, and without what a terminal would obey."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            told = record.getMessage()
        except Exception:  # logging tells of it itself
            return True
        record.msg, record.args = visible(redacted(told)), None
        return True
