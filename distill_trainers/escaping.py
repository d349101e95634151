"""Text of models, data and users where it is shown: one function for each place, so that nothing of it is obeyed there.

HTML is `reporting.markup`'s business, and YAML that of its library.
"""

from __future__ import annotations

import html
import re
import string
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

# Characters that would change how the text around them is shown, or not be seen at all: C0 and C1 controls but for tab
# and line feed, marks of direction, the zero-width space, the byte order mark; and surrogates, which UTF-8 has not.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: Any) -> str:
    """Name characters of `text` that hide, reorder or give orders by their number, such as `‹U+202E›`."""
    return _HIDDEN.sub(lambda match: f"‹U+{ord(match[0]):04X}›", str(text).replace("\r\n", "\n"))


def one_line(text: Any) -> str:
    """Write text on one line of a terminal or a file."""
    return " ".join(visible(text).split())


def terminal(text: Any, style: str = "") -> Text:
    """Make text for rich, which reads markup in plain strings."""
    from rich.text import Text

    return Text(visible(text), style=style)


def prose(text: Any) -> str:
    """Write text into a line, a heading or a table of Markdown, where it is neither markup nor HTML."""
    written = html.escape(one_line(text), quote=False)
    written = re.sub(r"([\\`*\[\]|~])|(?<!\w)_|_(?!\w)", lambda match: f"\\{match[0]}", written)
    return re.sub(r"^(#+|[-+>]|\d+[.)])(?=\s|$)", lambda match: match[0][:-1] + f"\\{match[0][-1]}", written)


def code(text: Any) -> str:
    """Write text as code within a line or a table of Markdown."""
    written = one_line(text)
    if not re.search(r"[`<>|&\\]", written):
        return f"`{written}`"
    entities = {ord(character): f"&#{ord(character)};" for character in string.punctuation if character not in ".-/:,"}
    return f"<code>{written.translate(entities)}</code>"


def fence(text: str, language: str = "") -> list[str]:
    """Write lines of code for Markdown, in a fence that is longer than any within."""
    text = visible(text)
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return [f"{ticks}{language}", *text.splitlines(), ticks]
