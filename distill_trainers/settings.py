"""How settings are declared and refused."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from typing import Any, TypeVar

from .exceptions import ConfigurationError
from .redaction import hidden


def setting(default: Any, help: str) -> Any:
    """A field of a settings dataclass; `help` is what `--help` and the documentation say about it."""
    return dataclasses.field(default=default, metadata={"help": help})


_Config = TypeVar("_Config", bound=type)
_PACKAGE = __name__.partition(".")[0]


def documented(config: _Config) -> _Config:
    """List in the docstring of a settings dataclass, as `Args`, all settings that this package declares."""
    declared = [
        vars(base).get("__annotations__", {}) for base in config.__mro__ if base.__module__.startswith(_PACKAGE)
    ]
    rows = [
        textwrap.fill(
            f"{field.name}: {field.metadata['help']} Default: {field.default!r}.",
            width=116,
            initial_indent="    ",
            subsequent_indent="        ",
        )
        for field in dataclasses.fields(config)
        if any(field.name in names for names in declared) and "help" in field.metadata
    ]
    head, raises, rest = inspect.cleandoc(config.__doc__ or "").partition("\nRaises:\n")
    more = "All other settings are those of `transformers.TrainingArguments`."
    config.__doc__ = "\n".join([head.rstrip(), "", more, "", "Args:", *rows, raises.rstrip("\n"), rest])
    return config


def require(condition: bool, name: str, got: Any, expected: str) -> None:
    """Raise ConfigurationError naming the setting unless `condition` holds."""
    if not condition:
        raise ConfigurationError(f"Got `{name}: {hidden(got, name)}`; expected {expected}.")


class Checked:
    """Settings that refuse what cannot work."""

    def _require(self, name: str, condition: bool, expected: str) -> None:
        """Raise ConfigurationError naming the setting and its value unless `condition` holds."""
        require(condition, name, getattr(self, name), expected)
