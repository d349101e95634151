"""HTML by functions that escape: text becomes markup only by `el`, so nothing of data or models is read as such."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from ..escaping import visible


class Html(str):
    """Markup that is put into a page as it is."""


def escaped(value: Any) -> Html:
    """Write any value as text of a page."""
    return value if isinstance(value, Html) else Html(html.escape(visible(str(value))))


def shortened(text: str, longest: int) -> str:
    """Cut `text` where it is longer, with the number of characters left out; never within a combined one."""
    if len(text) <= longest:
        return text
    cut = longest
    while cut > longest // 2 and unicodedata.combining(text[cut]):
        cut -= 1
    return f"{text[:cut]}… (+{len(text) - cut:,})"


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """Make an element; children that are no `Html` are escaped, None is left out, lists are taken apart.

    Attributes: `class_` is `class`, `aria_label` is `aria-label`; True stands alone, None and False are left out.
    """
    head = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escaped(value)}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    inner = join(children)
    return Html(f"<{tag}{head}>" if tag in _VOID else f"<{tag}{head}>{inner}</{tag}>")


_VOID = {"meta", "input", "br", "hr"}


def join(children: Iterable[Any]) -> Html:
    """Put children one after the other."""
    parts = []
    for child in children:
        if child is None:
            continue
        parts.append(join(child) if isinstance(child, list | tuple) else escaped(child))
    return Html("".join(parts))


def table(
    caption: Any, headings: Sequence[Any], rows: Iterable[Sequence[Any]], *, numbers: bool = True, kind: str = ""
) -> Html:
    """Make a table whose first column names its rows; a narrow screen scrolls it, by keyboard too.

    Args:
        numbers: cells but the first are aligned to the right.
        kind: of which all columns fit on a phone: `narrow`, as its words are; `result`, with names above their values.
    """
    head = el("tr", [el("th", title, scope="col") for title in headings])
    body = [el("tr", el("th", row[0], scope="row"), [el("td", cell) for cell in row[1:]]) for row in rows]
    kind = " ".join(filter(None, ["numbers" if numbers else "", kind]))
    # The span keeps the title in sight where the table scrolls below it.
    title = el("caption", el("span", caption))
    inner = el("table", title, el("thead", head), el("tbody", body), class_=kind or None)
    label = caption if not isinstance(caption, Html) else re.sub(r"<[^>]*>", "", html.unescape(caption))
    return el("div", inner, class_="scroll", role="region", aria_label=label, tabindex="0")


def stacked(shown: str) -> Html:
    """Write a value, and its interval in brackets on a line of its own."""
    value, bracket, rest = shown.partition(" [")
    return join([value, el("small", f"[{rest}", class_="interval") if bracket else None])


def figure(
    title: Any, drawing: Html, *, legend: Html | None = None, note: Any = None, numbers: Html | None = None
) -> Html:
    """Show a drawing with its title, and behind a switch the numbers in it."""
    more = el("details", el("summary", "Numbers"), numbers, class_="data") if numbers else None
    caption = el("figcaption", el("b", title), el("span", note) if note else None)
    return el("figure", caption, drawing, legend, more)


def missing(*sentence: Any) -> Html:
    """Tell what is not in the page, and how to get it."""
    return el("p", sentence, class_="missing")


def section(identity: str, title: Any, *children: Any, level: int = 2) -> Html:
    return el("section", el(f"h{level}", title, id=identity), children, aria_labelledby=identity)


def data_script(value: Any) -> Html:
    """Write JSON for the page's own script; no text in it can end the element."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return el("script", Html(written), type="application/json")
