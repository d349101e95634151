"""Answer formats: where in a response the chain of thought ends and what the answer is.

Text of a model is data and nothing else: it is never evaluated, and text in which no format finds an answer has none.
Every pattern is linear in the length of the text; a pattern of the user's has a time limit.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..exceptions import ConfigurationError
from .numbers import as_number

Found = tuple[int, str]  # where the statement of the answer begins, and the answer

REGEX_PREFIX = "regex:"
_REGEX_SECONDS = 1.0
_LONGEST = 100_000  # characters of a response that are looked at, from its end

_ANSWER_IS = re.compile(
    r"(?:\b(?:so|thus|hence|therefore),? )?\bthe (?:final |correct |right )?answer(?: is\b|:)[ \t]*:?", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_LETTER = re.compile(r"\(([A-Ja-j])\)|\b([A-J])(?=[).:,\s]|$)")
_BRACES = re.compile(r"\\(?:boxed|fbox)\{|\\.|[{}]")
_BOX = re.compile(r"\\(?:boxed|fbox)(?=\{)")
_CHOICE_LINE = re.compile(r"\(([A-Ja-j])\)|^[ \t]*(?:[Aa]nswer:[ \t]*)?([A-J])(?=[).:]|[ \t]*$)", re.MULTILINE)
_QUOTES = "\"'`*_ \t“”‘’"


@dataclass(frozen=True)
class Parsed:
    """A response taken apart.

    Attributes:
        rationale: the text before the statement of the answer; all of it where there is no answer.
        answer: as it stands in the text, or None.
        format: name of the format that found it, or None.
    """

    rationale: str
    answer: str | None
    format: str | None


def parse_response(text: str, formats: Sequence[str] = (), *, next_question: str | None = "Q:") -> Parsed:
    """Read rationale and answer of a response: the first of `formats` that finds an answer decides.

    Args:
        text: what a model wrote.
        formats: names in `FORMATS`, or `regex:` and a pattern whose first group (or whole match) is the answer; by
            default `hash`, `boxed` and `answer_is`.
        next_question: what begins a line where the model goes on with a question of its own; the text is cut there.

    Raises:
        ConfigurationError: an unknown format, or a pattern that does not compile.
    """
    text = cut_at_next_question(text, next_question)[-_LONGEST:]
    for name in formats or DEFAULT_FORMATS:
        answer_at = find_format(name)(text)
        if answer_at is not None and answer_at[1]:
            return Parsed(text[: answer_at[0]].strip(), answer_at[1], name)
    return Parsed(text.strip(), None, None)


def cut_at_next_question(text: str, marker: str | None = "Q:") -> str:
    """Cut `text` before the first line, but the very first, that begins with `marker`."""
    if not marker:
        return text
    end = text.find("\n" + marker)
    return text if end < 0 else text[:end]


def find_format(name: str) -> Callable[[str], Found | None]:
    """Return the function of a format.

    Raises:
        ConfigurationError: an unknown name, or a pattern that does not compile.
    """
    if name.startswith(REGEX_PREFIX):
        return _user_pattern(name.removeprefix(REGEX_PREFIX))
    if name not in FORMATS:
        raise ConfigurationError(
            f"Got the answer format {name!r:.80}; expected one of {', '.join(FORMATS)}, or `regex:` and a pattern "
            "whose first group is the answer."
        )
    return FORMATS[name]


def _hash(text: str) -> Found | None:
    """`#### 42`, as in GSM8K: the rest of the line after the last one, unless that is a heading of what follows."""
    start = text.rfind("####")
    if start < 0:
        return None
    line, _, rest = text[start:].lstrip("#").partition("\n")
    answer = clean(line)
    return None if rest.strip() and as_number(answer) is None else (start, answer)


def _answer_is(text: str) -> Found | None:
    """`The answer is 42.`: the rest of the sentence after the last one."""
    last = _last(_ANSWER_IS.finditer(text))
    if last is None:
        return None
    statement = _first_statement(text[last.end() :])
    inside = _boxed(statement)
    return last.start(), inside[1] if inside else statement


def _boxed(text: str) -> Found | None:
    r"""The last `\boxed{…}` that is closed, with whatever is nested in it; what states it belongs to the statement."""
    open_at: list[tuple[int, int] | None] = []
    last: tuple[int, int, int] | None = None  # where it begins, where its content does, and where that ends
    for token in _BRACES.finditer(text):
        if token[0].endswith("{"):
            open_at.append(token.span() if len(token[0]) > 1 else None)
        elif token[0] == "}" and open_at:
            box = open_at.pop()
            if box is not None:  # a box around it would close later, and be found later
                last = *box, token.start()
    if last is None:
        return None
    line = text.rfind("\n", 0, last[0]) + 1
    stated = _ANSWER_IS.search(text, line, last[0])
    return (stated.start() if stated else last[0]), clean(_BOX.sub("", text[last[1] : last[2]]))


def _choice(text: str) -> Found | None:
    """A letter of multiple choice: in the statement of the answer, else the last `(b)` or a line such as `B)`."""
    stated = _answer_is(text)
    if stated is not None:
        letter = _LETTER.match(stated[1]) or re.fullmatch(r"([A-Ja-j])", stated[1])
        return (stated[0], _letter_of(letter)) if letter else None
    last = _last(_CHOICE_LINE.finditer(text))
    return (last.start(), _letter_of(last)) if last else None


def _last(matches: Iterator[Any]) -> Any:
    """The last of some matches, or None."""
    match = None
    for match in matches:  # noqa: B007
        pass
    return match


def _letter_of(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group).upper()


def _user_pattern(pattern: str) -> Callable[[str], Found | None]:
    import regex

    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ConfigurationError(f"The answer format 'regex:{pattern}' does not compile: {error}.") from error

    def find(text: str) -> Found | None:
        try:
            last = _last(compiled.finditer(text, timeout=_REGEX_SECONDS))
        except TimeoutError:
            return None
        if last is None:
            return None
        return last.start(), clean(last.group(1) or "" if compiled.groups else last.group())

    return find


FORMATS: dict[str, Callable[[str], Found | None]] = {
    "hash": _hash,
    "boxed": _boxed,
    "answer_is": _answer_is,
    "choice": _choice,
}
DEFAULT_FORMATS = ("hash", "boxed", "answer_is")


def _first_statement(text: str) -> str:
    """The first sentence of the first line; the point in 3.5 ends none."""
    line = text.strip().split("\n", 1)[0]
    end = _SENTENCE_END.search(line)
    return clean(line[: end.start()] if end else line)


def clean(answer: str) -> str:
    """Strip an answer of white space, quotes, emphasis and `$` around it, and of a full stop."""
    start, end, before = 0, len(answer), None
    while before != (start, end):  # by places: copies of what is left would be as many as there are marks
        before = start, end
        while start < end and _is_around(answer[start]):
            start += 1
        while start < end and _is_around(answer[end - 1]):
            end -= 1
        if answer.endswith(".", start, end):
            end -= 1
        if end - start > 1 and answer[start] == answer[end - 1] == "$":
            start, end = start + 1, end - 1
        if answer.startswith(r"\(", start, end) and answer.endswith(r"\)", start + 2, end):
            start, end = start + 2, end - 2
    return answer[start:end]


def _is_around(character: str) -> bool:
    return character in _QUOTES or character.isspace()


def question_text(question: str, choices: Sequence[str] | None = None) -> str:
    """Write a question with its choices below it, lettered."""
    letters = zip(string.ascii_uppercase, choices or (), strict=False)
    return "\n".join([question, *(f"({letter}) {choice}" for letter, choice in letters)])
