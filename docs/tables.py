"""Tables of settings in the documentation, written from the configs themselves.

`python docs/tables.py` writes them anew. Where a page says `<!-- settings: GKDConfig -->`, the table goes between that
line and `<!-- end of settings -->`: one row for each field that the class adds to its base, with its default and the
`help` of its metadata. The tests hold every page to it.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import distill_trainers

DOCS = Path(__file__).parent
TABLE = re.compile(r"(<!-- settings: (\w+) -->\n).*?(<!-- end of settings -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """`text` of a page with its tables as they ought to be."""
    return TABLE.sub(lambda found: found[1] + settings_table(getattr(distill_trainers, found[2])) + found[3], text)


def settings_table(config_class: type) -> str:
    """A Markdown table of the fields that `config_class` itself declares, in their order."""
    own = [f for f in fields(config_class) if f.name in inspect.get_annotations(config_class)]  # type: ignore[arg-type]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *map(_row, own)]) + "\n"


def _row(setting: Field[Any]) -> str:
    default = setting.default if isinstance(setting.default, str) else json.dumps(setting.default)
    return f"| `{setting.name}` | `{default}` | {setting.metadata['help'].replace('|', '&#124;')} |"


if __name__ == "__main__":
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"Wrote {page.relative_to(DOCS)}.")
