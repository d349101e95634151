"""The API reference, written from the docstrings: one Markdown page for each public module.

`reference_pages()` gives their texts by name; `docs/build.py` puts them beside the other pages. Docstrings are
Markdown with Google's sections (Args, Returns, Yields, Raises, Attributes), which become lists.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

MODULES = {
    "distill_trainers": "The package itself: trainers, their configs, teachers, students.",
    "distill_trainers.losses": "Divergences and losses, of tensors alone.",
    "distill_trainers.signals": "What a teacher can say about a token.",
    "distill_trainers.teachers": "Where a teacher's answers come from.",
    "distill_trainers.rollouts": "How completions are sampled, kept and used again.",
    "distill_trainers.data": "Datasets into batches.",
    "distill_trainers.rationales": "Chains of thought: parsing, verifying, pairing.",
    "distill_trainers.evaluation": "Scores, intervals, gaps.",
    "distill_trainers.exceptions": "What is raised.",
}
# Settings have a table on these pages; the reference points there.
SETTINGS = {
    "DistillConfig": "../recipes.md#keys-of-every-method",
    "GKDConfig": "../methods/gkd.md#settings",
    "MiniLLMConfig": "../methods/minillm.md#settings",
    "DPKDConfig": "../methods/dpkd.md#settings",
    "RationaleConfig": "../methods/rationale.md#settings",
    "EvaluationSettings": "../evaluation.md#settings",
}
TOP = "distill_trainers"
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes):[ \t]*(.*)$")
ITEM = re.compile(r"^(\w[\w, .*]*?):\s+(\S.*)$")


def reference_pages() -> dict[str, str]:
    """The text of each page by its file name, an index first."""
    index = ["# API reference", "", "Written from the docstrings.", "", "| module | |", "|---|---|"]
    index += [f"| [`{name}`]({name}.md) | {text} |" for name, text in MODULES.items()]
    pages = {"README.md": "\n".join(index) + "\n"}
    return pages | {f"{name}.md": module_page(name) for name in MODULES}


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, or else the classes and functions that the module itself defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = [(name, value) for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return [name for name, value in own if name[0] != "_" and (inspect.isclass(value) or inspect.isfunction(value))]


def module_page(name: str) -> str:
    module = importlib.import_module(name)
    lines = [f"# `{name}`", "", MODULES[name], "", *_prose(inspect.getdoc(module) or "")]
    for each in sorted(public_names(module), key=_place):
        lines += ["", *_entry(name, each, getattr(module, each))]
    return "\n".join(lines).rstrip() + "\n"


def _place(name: str) -> tuple[bool, bool, str]:
    """Trainers come first, then their configs, then all others by name."""
    return (not name.endswith("Trainer"), not name.endswith("Config"), name.lower())


def _entry(module: str, name: str, value: Any) -> Iterator[str]:
    yield from (f"## `{name}`", "")
    if module != TOP and name in importlib.import_module(TOP).__all__:
        yield f"In the package itself: [`{TOP}.{name}`]({TOP}.md#{name.lower()})."
        return
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        yield _value(value)
        return
    prose = value.__doc__ or ""
    if name in SETTINGS:  # its table has them
        prose = re.sub(r"\nArgs:\n(?:    .*\n)*", "", prose)
    yield from ("```python", _signature(name, value), "```", "", *_prose(prose))
    if name in SETTINGS:
        yield from ("", f"Each setting is explained in [its table]({SETTINGS[name]}).")
    if inspect.isclass(value):
        for method, function in _methods(value):
            yield from ("", f"### `{name}.{method}`", "")
            if not isinstance(function, property):
                yield from ("```python", _signature(method, function), "```", "")
            yield from _prose(function.__doc__ or "")


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that the class itself defines and documents."""
    for name, value in vars(cls).items():
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if name[0] != "_" and (inspect.isfunction(value) or isinstance(value, property)) and value.__doc__:
            yield name, value


def _signature(name: str, value: Any) -> str:
    """One line, or one parameter on each where that is too long; of settings, which have a table, the name alone."""
    if name in SETTINGS:
        return f"class {name}({', '.join(base.__name__ for base in value.__bases__ if base is not object) or ''})"
    word = "class" if inspect.isclass(value) else "def"
    signature = _constructor(value) if inspect.isclass(value) else inspect.signature(value)
    if len(line := _bare(f"{word} {name}{signature}")) <= 110:
        return line
    parts = [f"    {parameter}," for parameter in signature.parameters.values()]
    returns = "" if signature.return_annotation is inspect.Signature.empty else f" -> {signature.return_annotation}"
    return _bare("\n".join([f"{word} {name}(", *parts, f"){returns}"]))


def _constructor(cls: type) -> inspect.Signature:
    """That of the nearest class whose constructor names what it takes, rather than handing all of it on."""
    for owner in cls.__mro__:
        if not inspect.isfunction(vars(owner).get("__init__")):
            continue
        own, *taken = inspect.signature(owner.__init__).parameters.values()
        if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in taken):
            return inspect.Signature(taken)
    return inspect.Signature()


def _bare(text: str) -> str:
    """Annotations without quotes, defaults without addresses."""
    text = re.sub(r"(: |-> )'([^'\n]*)'", r"\1\2", text)
    return re.sub(r"<function .*? at 0x[0-9a-f]+>|<factory>", "...", text)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"A table of {len(value)}: {', '.join(f'`{key}`' for key in value)}."
    if isinstance(value, str | int | float | tuple | frozenset):
        return f"`{value!r}`"
    return inspect.getdoc(value) or f"`{value!r}`"


def _prose(doc: str) -> list[str]:
    """A docstring as Markdown: its sections become lists, the rest stays."""
    lines: list[str] = []
    inside, deeper = False, 0
    for line in inspect.cleandoc(doc).splitlines():
        if found := SECTION.match(line):
            inside, deeper = True, 0
            lines += ["", f"**{found[1]}**" + (f": {found[2]}" if found[2] else ""), ""]
        elif not inside or not line.strip():
            lines.append(line)
        elif line[0] != " ":
            inside = False
            lines += ["", line]
        else:
            deeper = deeper or len(line) - len(line.lstrip())
            lines.append(_item(line[deeper:]) if line[deeper : deeper + 1] != " " else f"  {line.strip()}")
    return lines


def _item(line: str) -> str:
    """`name: text` as an item of a list; the rest of an item is indented."""
    found = ITEM.match(line)
    return f"- `{found[1]}`: {found[2]}" if found else line
