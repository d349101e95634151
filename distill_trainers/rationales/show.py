"""Pairs of chains with their key steps marked: lines for a terminal, a page for a browser."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..answers.edit_distance import key_tokens
from ..escaping import visible

Split = Callable[[str], list[str]]


def words(text: str) -> list[str]:
    """Split into words with the white space before them."""
    return re.findall(r"\s*\S+|\s+$", text)


def marked(row: Mapping[str, Any], split: Split = words) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Return pieces of the right and of the wrong chain, and whether each is a key step.

    Args:
        split: cuts a text into pieces that make it up; a tokenizer's tokens are what training sees.
    """
    numbers: dict[str, int] = {}
    right, wrong = split(row["rationale"]), split(row["wrong_rationale"])
    ids = [[numbers.setdefault(piece.strip() or piece, len(numbers)) for piece in side] for side in (right, wrong)]
    keys = key_tokens(*ids)
    pairs = [list(zip(side, map(bool, key), strict=True)) for side, key in zip((right, wrong), keys, strict=True)]
    return pairs[0], pairs[1]


def terminal_lines(row: Mapping[str, Any], split: Split = words) -> list[str]:
    """Write lines in rich's markup: key steps of the right chain green, of the wrong one red."""
    from rich import markup

    def escape(text: str) -> str:
        return markup.escape(visible(text))

    def line(mark: str, pieces: Sequence[tuple[str, bool]], colour: str) -> str:
        text = "".join(f"[{colour}]{escape(piece)}[/]" if key else escape(piece) for piece, key in pieces)
        return f"[bold {colour.split()[-1]}]{mark}[/] {text}"

    right, wrong = marked(row, split)
    source = f" ({row['source']})" if row.get("source") else ""
    title = escape(f"{row['question']} -> {row['answer']}{source}")
    return [f"[bold]{title}[/]", line("+", right, "bold green"), line("-", wrong, "bold red")]


def html_page(rows: Iterable[Mapping[str, Any]], split: Split = words) -> str:
    """Write a page without scripts; whatever a model wrote is escaped."""

    def escape(text: Any) -> str:
        return html.escape(visible(text))

    def line(pieces: Sequence[tuple[str, bool]], tag: str) -> str:
        return "".join(f"<{tag}>{escape(p)}</{tag}>" if key else escape(p) for p, key in pieces)

    parts = []
    for row in rows:
        right, wrong = marked(row, split)
        source = escape(row.get("source", ""))
        title = f"{escape(row['question'])} <b>{escape(row['answer'])}</b> <small>{source}</small>"
        parts.append(f"<h2>{title}</h2>\n<p>{line(right, 'ins')}</p>\n<p>{line(wrong, 'del')}</p>")
    style = (
        "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto}h2{font-size:1em;font-weight:normal}"
        "p{white-space:pre-wrap}ins{background:#cfc;text-decoration:none}del{background:#fcc;text-decoration:none}"
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<meta charset="utf-8">\n<title>Dual chains</title>\n<style>{style}</style>\n{body}\n'
