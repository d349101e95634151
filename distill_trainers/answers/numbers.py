"""Numbers as people and models write them, exactly and without evaluating anything."""

from __future__ import annotations

import ast
import operator
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

_LONGEST = 200  # characters of anything that is read as a number

_NUMBER = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d{1,2})?"
_PLAIN = re.compile(_NUMBER)
_RATIO = re.compile(r"([+-]?\d+) ?/ ?(\d+)")
_CHANGES_IT = r"(?i:hundreds?|thousands?|[mbtr]+illions?|dozens?|half|halves|thirds?|squared|cubed)\b"  # no units
_WITH_WORDS = re.compile(r"(?:[A-Za-z]+ = )?[$€£¥]?(" + _NUMBER + r") ?%?(?: (?!" + _CHANGES_IT + r")[A-Za-z]{2,}\.?)*")
_ARITHMETIC = re.compile(r"[\d\s.+\-*/()]+")
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def normalised(text: str) -> str:
    """Unify compatible characters (full-width and other scripts' digits become ASCII) and spaces."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("×", "*").replace("÷", "/")
    digits = (str(unicodedata.digit(c)) if not c.isascii() and c.isdecimal() else c for c in text)
    return " ".join("".join(digits).split())


def as_number(text: str) -> Fraction | None:
    """Return the number that `text` is, or None.

    Read are integers, decimals, thousands with commas, fractions, a unit or currency around one number (`$18`, `18
    dollars`, `50 %`, whose sign counts as a unit), and + − · / with parentheses over numbers. Powers are not, so that
    nothing grows beyond what was written.
    """
    if len(text) > 2 * _LONGEST:
        return None
    text = normalised(text).rstrip(".")
    if not text or len(text) > _LONGEST or not any(c.isdigit() for c in text):
        return None
    ratio = _RATIO.fullmatch(text)
    if ratio:
        return Fraction(int(ratio[1]), int(ratio[2])) if int(ratio[2]) else None
    single = _PLAIN.fullmatch(text) or _WITH_WORDS.fullmatch(text)
    if single:
        return _fraction(single[1] if single.re is _WITH_WORDS else single[0])
    return _arithmetic(text) if _ARITHMETIC.fullmatch(text) else None


def same_number(one: Fraction, other: Fraction) -> bool:
    """Compare: whole numbers exactly, else up to a relative 1e-6 and 1/200, so that 33.3333333 is 100/3."""
    if one.denominator == other.denominator == 1:
        return one == other
    return abs(one - other) <= min(abs(other) / 10**6, Fraction(1, 200))


def _fraction(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _arithmetic(text: str) -> Fraction | None:
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    """The value of a syntax tree of numbers and the four operations; anything else is a ValueError."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(repr(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{type(node).__name__} is not arithmetic")
