"""Whether an answer is right: numbers, expressions, multiple choice, text; and the majority where nobody knows."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..settings import require
from .formats import DEFAULT_FORMATS, parse_response
from .numbers import CHANGING_WORDS, as_number, normalised, same_number
from .symbolic import SymbolicEquality, is_available, require_math_verify

ANSWER_KINDS = ("auto", "number", "math", "exact", "choice")

RIGHT, WRONG, NO_ANSWER, UNDECIDED = "right", "wrong", "no answer", "undecided"

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
# What has numbers within, none of which is that of the whole.
_LATEX = r"\\(?:[dt]?frac\{[^{}]{0,40}\}\{[^{}]{0,40}\}|sqrt(?:\[\d\])?\{[^{}]{0,40}\})"
_TIMES = r"(?:[×÷·±x]|\*\*?|\+/[-−]|\\(?:cdot|times|div|pm)\b)"
# Whole numbers, decimals and fractions, but no part of a term, a version or a power.
_LAST_NUMBER = (
    r"regex:(?<![\w.^])(?<!\d[-−+*/]\s?)[-−]?\s?\$?"
    rf"(?:{_LATEX}|\d[\d,]*+(?: \d{{3}}\b)*+(?:\.\d++)?+(?:/\d++)?+(?: \d++/\d++| ?{_LATEX})?+)(?: ?[kKMB]\b)?+"
    # `5 million` does not say 5, nor does 5², 5 ½, 5 1/2, 5 × 10^6 or `5 thousand 200`: what is not read is no number.
    r"\s?[⁰¹²³⁴-⁹⁻₀-₉¼-¾⅐-⅞‰]*+"
    rf"(?:\s?{_TIMES}\s?\d++(?:\.\d++)?+(?:\s?(?:\^|\*\*)\s?\{{?[-−]?\d++\}}?)?+[⁰¹²³⁴-⁹⁻]*+)*+"
    rf"(?!\.?\w|\s?[-−+*/^]\s?\d)(?:(?:[ -](?:(?i:{CHANGING_WORDS}|per mille)|MM)\b)++(?:,? (?:and )?+\d[\d,]*+)?+)?+"
)
_MATHS = re.compile(r"[\\^=√π]|[A-Za-z]\s*[+*/-]|\d[A-Za-z(]")


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and how that was found out.

    Attributes:
        reason: `right`, `wrong`, `no answer`, or `undecided` (a comparison that ran out of time, and is not right).
        how: the kind of comparison that decided.
    """

    reason: str
    how: str

    @property
    def right(self) -> bool:
        return self.reason == RIGHT


def check_kind(kind: str) -> None:
    """Refuse a kind of comparison that is not known, or that lacks its library.

    Raises:
        ConfigurationError: which one, and what to do.
    """
    require(kind in ANSWER_KINDS, "answer_kind", kind, f"one of {', '.join(ANSWER_KINDS)}")
    if kind == "math":
        require_math_verify()


_shared: list[SymbolicEquality] = []


def _symbolic() -> SymbolicEquality:
    """One process for all comparisons of this one, started when it is needed."""
    if not _shared:
        _shared.append(SymbolicEquality())
    return _shared[0]


def verify_answer(
    answer: str | None,
    reference: str,
    kind: str = "auto",
    choices: Sequence[str] | None = None,
    symbolic: SymbolicEquality | None = None,
) -> Verdict:
    """Compare an answer with its reference.

    Args:
        answer: as it was parsed, or None.
        kind: `choice`: both name the same of `choices`, by letter or by text. `number`: equal as numbers, else as
            text. `math`: equal as numbers, else as expressions. `exact`: equal as text but for case, articles,
            punctuation and white space. `auto`: `choice` where there are choices, else `number`, and `math` where one
            side looks like an expression and math-verify is installed.
        choices: of a multiple-choice question, in order.
        symbolic: compares expressions; by default one shared by all of this process.

    Raises:
        ConfigurationError: an unknown kind; `math` without math-verify.
    """
    check_kind(kind)
    if answer is None or not answer.strip():
        return Verdict(NO_ANSWER, kind)
    if kind == "choice" or (kind == "auto" and choices):
        return _verdict(_same_choice(answer, reference, choices or ()), "choice")
    if kind != "exact":
        one, other = as_number(answer), as_number(reference)
        if one is not None and other is not None:
            return _verdict(same_number(one, other), "number")
    if same_text(answer, reference):
        return Verdict(RIGHT, "exact")
    if kind == "math" or (kind == "auto" and is_available() and (_MATHS.search(answer) or _MATHS.search(reference))):
        equal = (symbolic or _symbolic())(answer, reference)
        return Verdict(UNDECIDED, "math") if equal is None else _verdict(equal, "math")
    return Verdict(WRONG, "exact")


def final_number(text: str) -> Fraction | None:
    """Read the number of an answer in a default format; without such an answer, the text's last number."""
    answer = parse_response(text, (*DEFAULT_FORMATS, _LAST_NUMBER)).answer
    return None if answer is None else as_number(answer)


def same_text(one: str, other: str) -> bool:
    """Compare but for case, articles, punctuation and spaces. Beside digits punctuation counts: 3,4 is not 34."""
    one, other = normalised(one).casefold(), normalised(other).casefold()
    if any(c.isdigit() for c in one + other):
        return one == other
    a, b = _plain(one), _plain(other)
    return a == b if a or b else one == other


def group_answers(
    answers: Sequence[str | None],
    kind: str = "auto",
    choices: Sequence[str] | None = None,
    symbolic: SymbolicEquality | None = None,
) -> list[list[str]]:
    """Group answers that mean the same, the largest group first. None is no answer, and in no group."""
    groups: list[list[str]] = []
    for answer in answers:
        if answer is None:
            continue
        for group in groups:
            if verify_answer(answer, group[0], kind, choices, symbolic).right:
                group.append(answer)
                break
        else:
            groups.append([answer])
    return sorted(groups, key=len, reverse=True)


def majority_answer(
    answers: Sequence[str | None],
    kind: str = "auto",
    choices: Sequence[str] | None = None,
    symbolic: SymbolicEquality | None = None,
) -> tuple[str | None, float]:
    """Return the answer that most samples agree on (self-consistency, arXiv 2203.11171), and their share of all.

    A tie, or no answer at all, gives None.
    """
    groups = group_answers(answers, kind, choices, symbolic)
    majority = majority_of(groups)
    return majority, 0.0 if majority is None else len(groups[0]) / len(answers)


def majority_of(groups: Sequence[Sequence[str]]) -> str | None:
    """Return the answer of the largest of `group_answers`; None without any, or where two are as large."""
    tie = len(groups) > 1 and len(groups[0]) == len(groups[1])
    return None if tie or not groups else groups[0][0]


def _verdict(equal: bool, reason: str) -> Verdict:
    return Verdict(RIGHT if equal else WRONG, reason)


def _same_choice(answer: str, reference: str, choices: Sequence[str]) -> bool:
    one, other = _choice_index(answer, choices), _choice_index(reference, choices)
    return one == other if one is not None and other is not None else same_text(answer, reference)


def _choice_index(answer: str, choices: Sequence[str]) -> int | None:
    """Which choice is meant, by its text or by its letter; the letter may stand before the text."""
    for index, choice in enumerate(choices):
        if same_text(answer, choice):
            return index
    answer = normalised(answer)
    letter = _LETTER.fullmatch(answer) or re.match(r"\(?([A-Za-z])[).:]", answer)
    if letter is None:
        return None
    index = string.ascii_lowercase.index(letter[1].lower())
    return index if not choices or index < len(choices) else None


def _plain(text: str) -> str:
    text = text.translate(str.maketrans("", "", string.punctuation))
    return " ".join(_ARTICLES.sub(" ", text).split())
