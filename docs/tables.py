"""Tables of settings in the documentation, written from the configs themselves.

`python docs/tables.py` writes them anew. Where a page says `<!-- settings: GKDConfig -->`, the table goes between that
line and `<!-- end of settings -->`: one row for each field that the class adds to its base, with its default and the
`help` of its metadata. `<!-- arguments -->` and `<!-- defaults -->` are for the fields of `TrainingArguments`, and for
the defaults that are others than TRL's. The tests hold every page to it.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

import distill_trainers
from distill_trainers.trainers.given.fields import ARGUMENTS

DOCS = Path(__file__).parent
TABLE = re.compile(r"(<!-- settings: (\w+) -->\n).*?(<!-- end of settings -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """`text` of a page with its tables as they ought to be."""
    for name, table in (("arguments", arguments_table), ("defaults", defaults_table)):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", _filled(table), text, flags=re.DOTALL)
    return TABLE.sub(lambda found: found[1] + settings_table(getattr(distill_trainers, found[2])) + found[3], text)


def settings_table(config_class: type) -> str:
    """A Markdown table of the fields that `config_class` itself declares, in their order."""
    own = [f for f in fields(config_class) if f.name in inspect.get_annotations(config_class)]  # type: ignore[arg-type]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *map(_row, own)]) + "\n"


def _filled(table: Callable[[], str]) -> Callable[[re.Match[str]], str]:
    return lambda found: found[1] + table() + found[2]


def arguments_table() -> str:
    """A Markdown table of the fields of `TrainingArguments` that do not simply act."""
    rows = [f"| `{name}` | {a.does} | {a.why} |" for name, a in ARGUMENTS.items() if a.why]
    return "\n".join(["| field | here | why, or what is different |", "|---|---|---|", *rows]) + "\n"


def differing_defaults(ours: type, theirs: type) -> list[tuple[str, Any, Any]]:
    """Name the settings that both have with another default: name, theirs, ours."""
    defaults = [{f.name: _default(f) for f in fields(cls) if f.init} for cls in (theirs, ours)]
    both = [name for name in defaults[0] if name in defaults[1] and defaults[0][name] != defaults[1][name]]
    return [(name, defaults[0][name], defaults[1][name]) for name in both]


def defaults_table() -> str:
    """A Markdown table of the defaults that are others than those of the config whose place ours takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl
        from trl.experimental.gkd import GKDConfig
    ours = distill_trainers
    pairs = {"GKD": (ours.GKDConfig, GKDConfig), "SFT": (ours.GKDConfig, trl.SFTConfig)}
    pairs |= {"Distillation": (ours.GKDConfig, trl.DistillationConfig), "DPO": (ours.DPKDConfig, trl.DPOConfig)}
    pairs["Trainer"] = (ours.GKDConfig, TrainingArguments)
    rows: dict[tuple[str, str, str], list[str]] = {}
    for title, (our, their) in pairs.items():
        for name, before, here in differing_defaults(our, their):
            rows.setdefault((name, _shown(before), _shown(here)), []).append(title)
    lines = [f"| `{n}` | {', '.join(titles)} | `{before}` | `{here}` |" for (n, before, here), titles in rows.items()]
    return "\n".join(["| setting | of | there | here |", "|---|---|---|---|", *lines]) + "\n"


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _row(setting: Field[Any]) -> str:
    default = setting.default if isinstance(setting.default, str) else json.dumps(setting.default)
    return f"| `{setting.name}` | `{default}` | {setting.metadata['help'].replace('|', '&#124;')} |"


if __name__ == "__main__":
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"Wrote {page.relative_to(DOCS)}.")
