"""Which keys a recipe may have, read from the source of its settings: importing them takes seconds."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..exceptions import ConfigurationError

_OURS = Path(__file__).parents[1]


def known_keys(method: str, *others: type) -> set[str] | None:
    """Name all keys of recipes of a method; None where only the classes themselves can tell.

    Args:
        others: dataclasses that are read besides.
    """
    own = _OURS / "trainers" / method / "config.py"
    if f"{__package__.partition('.')[0]}.trainers" in sys.modules or not own.is_file():
        return None  # they are imported already, or it is a method of somebody else
    files = [_file("transformers", "training_args.py"), _file("trl", "trainer/model_config.py"), own]
    files += [_OURS / "trainers/config.py", _OURS / "teachers/options.py"]
    files += [_OURS / "trainers/rewarded/settings.py"] * ("RewardSettings" in own.read_text(encoding="utf-8"))
    names = set().union(*map(_settings_in, files)) if all(file.is_file() for file in files) else None
    return names and names | {f.name for cls in others for f in fields(cls)}


def _file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin or "").parent / name if spec is not None else Path(name)


def _settings_in(file: Path) -> set[str]:
    """Name the annotated fields of the dataclasses in a file, but for those that belong to the class itself."""
    classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    lines = [line for cls in classes if cls.decorator_list for line in cls.body if isinstance(line, ast.AnnAssign)]
    own = [line for line in lines if "ClassVar" not in ast.unparse(line.annotation)]
    return {line.target.id for line in own if isinstance(line.target, ast.Name)}


def with_our_names(given: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys of a recipe with ours in place of TRL's.

    Raises:
        ConfigurationError: both names of one setting are there.
    """
    for theirs, ours in names.items():
        if theirs in given and ours in given:
            raise ConfigurationError(
                f"Got `{theirs}: {given[theirs]}` and `{ours}: {given[ours]}`, which are two names of one setting; "
                "expected one of them. Leave one out."
            )
    return {names.get(name, name): value for name, value in given.items()}


def options_with_our_names(argv: list[str], names: Mapping[str, str]) -> list[str]:
    """Return a command line with our names of options in place of TRL's; `--a-b` is written `--a_b`."""
    renamed = []
    for part in argv:
        if part.startswith("--"):
            name, equals, value = part[2:].partition("=")
            name = name.replace("-", "_")
            part = f"--{names.get(name, name)}{equals}{value}"
        renamed.append(part)
    return renamed
