"""YAML files of settings, read as they are written: nothing is dropped, guessed or unfolded without end."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from ..exceptions import ConfigurationError
from ..settings import shown

_MOST_BYTES = 2**20
_MOST_NODES = 100_000  # with each alias written out
_MOST_LEVELS = 50  # of brackets: the time that they take grows with the square
# Numbers as YAML 1.2 has them. To YAML 1.1 1e-5 is a text, 010 is 8, 1:30 is 90, and 2024-01-01 is a date.
_NUMBERS = {
    "int": (r"^(?:[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)$", "-+0123456789"),
    "float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
}


def read_settings(path: str | Path, what: str) -> dict[str, Any]:
    """Read a file of `key: value` lines.

    Args:
        what: the file is called in errors, such as "The recipe".

    Raises:
        ConfigurationError: it cannot be read, is no YAML in UTF-8, is no mapping, or names a key twice.
    """
    import yaml

    told = f"{what} {shown(str(path))!r}"
    text = _read_text(Path(path), told)
    try:
        content = yaml.load(text, Loader=_loader())  # a safe one: it makes plain values alone
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{told} is not valid YAML: {_without_text(error)}. Mend it there.") from error
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # of tags that do not fit, and huge numbers
        raise ConfigurationError(f"{told} holds a value that YAML cannot read: {shown(error, 300)}") from error
    except RecursionError as error:
        raise ConfigurationError(
            f"{told} holds values hundreds of levels deep; expected `key: value` lines. Check its brackets."
        ) from error
    if content is None:
        raise ConfigurationError(f"{told} is empty; expected `key: value` lines.")
    if not isinstance(content, dict):
        raise ConfigurationError(f"{told} holds {type(content).__name__}; expected `key: value` lines.")
    for key in content:
        if not isinstance(key, str):
            raise ConfigurationError(
                f"{told} has the key {shown(key)!r}, which is no text; expected the name of a setting. YAML reads "
                "no, off, yes and on as false and true: put such a word in quotes."
            )
    return content


def _without_text(error: Any) -> str:
    """Say what is wrong in which line, without the text that stands there: it may be a secret cut in two."""
    mark, words = getattr(error, "problem_mark", None), [getattr(error, name, None) for name in ("context", "problem")]
    return f"{shown(' '.join(filter(None, words)))} in line {mark.line + 1}" if mark else shown(error, 300)


def _read_text(path: Path, told: str) -> str:
    if path.is_dir():
        raise ConfigurationError(f"{told} is a folder; expected a file. Name the file in it.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"{told} cannot be read: {error.strerror or error}. Check its name and rights."
        ) from error
    if len(data) > _MOST_BYTES:
        raise ConfigurationError(f"{told} has {len(data)} bytes; expected settings, of at most {_MOST_BYTES} bytes.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        found = "is in UTF-16" if utf_16 else f"is not in UTF-8 (line {line}, byte {data[error.start]:#04x})"
        raise ConfigurationError(
            f"{told} {found}; expected text in UTF-8. Save it anew in that encoding: `iconv -f "
            f"{'utf-16' if utf_16 else 'latin1'} -t utf-8 OLD > NEW`."
        ) from error


@cache
def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what a safe loader takes without a word."""

        # Numbers and dates of YAML 1.1 give way; its words for true and false stay.
        yaml_implicit_resolvers = {
            first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in (*_NUMBERS, "timestamp")]
            for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None and _size(node, {}) > _MOST_NODES:
                raise yaml.YAMLError(f"its aliases (*name) unfold to more than {_MOST_NODES} values")
            return node

        def fetch_flow_collection_start(self, token: Any) -> None:
            if self.flow_level >= _MOST_LEVELS:
                raise yaml.YAMLError(f"it has brackets within brackets, {_MOST_LEVELS} levels deep")
            super().fetch_flow_collection_start(token)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)  # as it is written: `<<` has not put others' keys into it yet
            lines: dict[Any, int] = {}
            for key, _ in node.value:
                name, line = key.value, key.start_mark.line + 1
                if isinstance(name, str) and name != "<<" and name in lines:
                    raise yaml.YAMLError(f"the key {name!r} stands twice, in the lines {lines[name]} and {line}")
                if isinstance(name, str):
                    lines[name] = line
            return node

        def construct_yaml_int(self, node: Any) -> int:
            text = self.construct_scalar(node)
            return int(text, 0 if text[:2] in ("0x", "0o") else 10)

    for name, (form, first) in _NUMBERS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(form), list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    return Loader


def _size(node: Any, known: dict[int, int]) -> int:
    """Count the values below a node, each as often as it is named; infinitely many are counted as too many."""
    if isinstance(node.value, str):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_NODES + 1  # of a node that holds itself
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = min(_MOST_NODES + 1, 1 + sum(_size(part, known) for part in parts))
    return known[id(node)]
