"""The final number of a worked answer, to compare answers to maths problems. Text is read, never evaluated."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"(?<![\w.])[-−–]?\s?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])[-−–]?\$?\.\d+")
_MARK = "####"


def final_number(text: str) -> Decimal | None:
    """The number behind the last `####` (as GSM8K writes answers), else the last number of the text; None without one.

    Thousands' commas and a dollar sign do not count: `$1,250.00` is 1250.
    """
    marked = _NUMBER.search(text.rsplit(_MARK, 1)[1]) if _MARK in text else None
    found = marked or next(reversed(list(_NUMBER.finditer(text))), None)
    if found is None:
        return None
    digits = re.sub(r"[\s,$]", "", found.group()).replace("−", "-").replace("–", "-")
    return Decimal(digits)


def same_final_number(text: str, answer: str) -> bool:
    """Whether both end in the same number; False where either has none."""
    said, right = final_number(text), final_number(answer)
    return said is not None and said == right
