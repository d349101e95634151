"""How settings are declared and refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from .exceptions import ConfigurationError


def setting(default: Any, help: str) -> Any:
    """A field of a settings dataclass; `help` is what `--help` and the documentation say about it."""
    return dataclasses.field(default=default, metadata={"help": help})


def require(condition: bool, name: str, got: Any, expected: str) -> None:
    """Raise ConfigurationError naming the setting unless `condition` holds."""
    if not condition:
        raise ConfigurationError(f"Got `{name}: {got}`; expected {expected}.")


class Checked:
    """Settings that refuse what cannot work."""

    def _require(self, name: str, condition: bool, expected: str) -> None:
        """Raise ConfigurationError naming the setting and its value unless `condition` holds."""
        require(condition, name, getattr(self, name), expected)
