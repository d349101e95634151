"""How settings are declared and refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from typing import Any, TypeVar

from .exceptions import ConfigurationError
from .redaction import hidden

_SHOWN = 120  # characters of a value that an error repeats


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Where a number must lie: `least` and `most` are taken themselves, `above` and `below` are not.

    Attributes:
        words: in place of what they come to, as the end of a sentence.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    words: str = ""

    def admits(self, value: Any) -> bool:
        """Tell whether a number lies within; NaN does not."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low, high = (self.least, self.above), (self.most, self.below)
        if self.words or not any(end is not None for end in (*low, *high)):
            return self.words or "a number"
        if high == (None, None):
            return f"a number above {self.above:g}" if self.least is None else f"{self.least:g} or more"
        if low == (None, None):
            return f"a number below {self.below:g}" if self.most is None else f"{self.most:g} or less"
        begin = f"({self.above:g}" if self.least is None else f"[{self.least:g}"
        return f"a number in {begin}, " + (f"{self.below:g})" if self.most is None else f"{self.most:.10g}]")


def setting(default: Any, help: str, **bounds: Any) -> Any:
    """A field of a settings dataclass.

    Args:
        help: what `--help` and the documentation say about it.
        bounds: those of its number, see `Bounds`.
    """
    return dataclasses.field(
        default=default, metadata=_Metadata(help=help, bounds=Bounds(**bounds) if bounds else None)
    )


class _Metadata(dict[str, Any]):
    """What is known of a field; transformers' parser hands a copy of it on to argparse, which knows no bounds."""

    def copy(self) -> dict[str, Any]:
        return {"help": self["help"]}


def shown(value: Any, room: int = _SHOWN) -> str:
    """Return a value, or what a library says, as an error shows it: on one line, and not longer than one can read."""
    try:
        text = str(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"
    text = " ".join(text.split()) if isinstance(value, Exception) else text
    text = text if text.isprintable() else json.dumps(text)
    return text if len(text) <= room else f"{text[: room - 1]}…"


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
        raise ConfigurationError(f"Got `{name}: {shown(hidden(got, name))}`; expected {expected}.")


class Checked:
    """Settings that refuse what cannot work."""

    def _require(self, name: str, condition: bool, expected: str) -> None:
        """Raise ConfigurationError naming the setting and its value unless `condition` holds."""
        require(condition, name, getattr(self, name), expected)
