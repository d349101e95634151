"""docs/troubleshooting.md quotes the messages of the package: each must still be written somewhere in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUOTES = re.findall(r"^> (.+)$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
VARIES = "\0"  # stands in a message for what it is given


def _texts(source: str):
    """Every text of a file but docstrings, with `VARIES` where a value goes in; texts that are added up are one."""
    nodes = list(ast.walk(ast.parse(source)))
    inside = {id(part) for node in nodes if isinstance(node, ast.BinOp | ast.JoinedStr) for part in _parts(node)}
    inside |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and id(node) not in inside:
            yield re.sub(r"%[srd.0-9f]+", VARIES, _text(node))


def _parts(node):
    children = node.values if isinstance(node, ast.JoinedStr) else [node.left, node.right]
    for child in children:
        yield child
        if isinstance(child, ast.BinOp):
            yield from _parts(child)


def _text(node) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(_text, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case _:
            return VARIES


@pytest.fixture(scope="module")
def messages():
    files = (ROOT / "distill_trainers").rglob("*.py")
    return [text for file in files for text in _texts(file.read_text(encoding="utf-8")) if len(text) > 20]


@pytest.mark.parametrize("quote", QUOTES)
def test_the_package_writes_what_is_quoted(quote, messages):
    """The words between the `…` of a quote stand in one message, in this order."""
    words = [part.strip() for part in quote.split("…") if part.strip()]
    assert sum(map(len, words)) >= 12, "too short to be found again"
    # What a `…` leaves out may have fixed words in it, such as units.
    pattern = re.compile(".*".join(map(re.escape, words)), re.DOTALL)
    assert any(pattern.search(message) for message in messages), quote


def test_there_are_quotes():
    assert len(QUOTES) > 30
