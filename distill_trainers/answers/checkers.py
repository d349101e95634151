"""Checkers: what a completion is worth, by rules that anyone can verify. No model.

A checker is named as `final_number`, or with what it needs to know as `format:<pattern>`. It gives 1 for right and 0
for wrong (`length` what lies between, too), and None where that was not found out in time: nobody calls such an answer
wrong. A text is data and never evaluated; patterns of the user's have a time limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..exceptions import ConfigurationError, DatasetError
from ..settings import shown
from .formats import clean, parse_response
from .numbers import as_number, same_number
from .symbolic import require_math_verify
from .verify import UNDECIDED, final_number, verify_answer

_PATTERN_SECONDS = 1.0
_LONGEST = 100_000  # characters of a completion that are looked at, from its end
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """A completion, and what is known of its question.

    Attributes:
        num_tokens: of the completion, its end included.
        answer: the right one, plain or worked out (`… #### 42`); None where rows have none.
        choices: of a multiple-choice question, in order.
    """

    text: str
    num_tokens: int = 0
    answer: str | None = None
    choices: Sequence[str] = ()

    @property
    def reference(self) -> str:
        """The answer that `answer` states, or all of it."""
        return parse_response(self.answer or "").answer or (self.answer or "").strip()

    @property
    def stated(self) -> str | None:
        """The answer that the text states in a default format."""
        return parse_response(self.text).answer


Check = Callable[[Sample], float | None]


def checker(name: str) -> Check:
    """Return the check of a name, or of a name with its setting behind a colon.

    Raises:
        ConfigurationError: an unknown name, a setting that is missing or not wanted, or math without its library.
    """
    kind, colon, wanted = name.partition(":")
    if kind in PLAIN:
        if colon:
            raise ConfigurationError(f"Got the reward {name!r:.80}; expected `{kind}` alone, which has no setting.")
        if kind == "math":
            require_math_verify()
        return PLAIN[kind]
    if kind not in WITH_SETTING:
        raise ConfigurationError(f"Got the reward {name!r:.80}; expected one of {', '.join(NAMES)}.")
    return WITH_SETTING[kind](wanted)


def reads_answer(name: str) -> bool:
    """Tell whether a checker compares with the right answer, which rows must bring."""
    return name in PLAIN


def _number(sample: Sample) -> float:
    """The last number, or the one that is stated as the answer, equals that of the right answer."""
    reference = as_number(sample.reference)
    if reference is None:
        raise DatasetError(
            f"Got the right answer {shown(sample.answer, 80)!r} with the reward `final_number`; expected a number, "
            "alone or behind `####`. Mend the row, name another column, or take `exact`."
        )
    found = final_number(sample.text)
    return float(found is not None and same_number(found, reference))


def _choice(sample: Sample) -> float:
    """The letter, or the text, of the right choice."""
    found = parse_response(sample.text, ("choice",)).answer or clean(sample.text.strip().split("\n", 1)[0])
    return float(verify_answer(found, sample.reference, "choice", list(sample.choices)).right)


def _math(sample: Sample) -> float | None:
    """The stated answer, or the last line, equals the right one as an expression (math-verify)."""
    lines = sample.text.strip().splitlines() or [""]
    verdict = verify_answer(sample.stated or clean(lines[-1]), sample.reference, "math")
    return None if verdict.reason == UNDECIDED else float(verdict.right)


def _exact(sample: Sample) -> float:
    """The whole completion, or the answer that it states, is the right one but for case, articles and punctuation."""
    return float(verify_answer(sample.stated or sample.text.strip(), sample.reference, "exact").right)


def _json(keys: str) -> Check:
    """The completion is JSON, alone or in one fence; with keys it is an object that has them all."""
    wanted = {key.strip() for key in keys.split(",") if key.strip()}

    def check(sample: Sample) -> float:
        text = sample.text.strip()
        fenced = _FENCED.fullmatch(text)
        try:
            value: Any = json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(not wanted or (isinstance(value, dict) and wanted <= value.keys()))

    return check


def _no_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(name)


def _length(limit: str) -> Check:
    """1 up to so many tokens, from there on less, and 0 from twice as many on."""
    if not limit.isdecimal() or not int(limit):
        raise ConfigurationError(f"Got the reward 'length:{limit:.80}'; expected a number of tokens, as `length:200`.")
    most = int(limit)
    return lambda sample: min(1.0, max(0.0, 2.0 - sample.num_tokens / most))


def _format(pattern: str) -> Check:
    """The pattern is found in the completion; `^` and `$` are its ends, and a point matches new lines too."""
    import regex

    if not pattern:
        raise ConfigurationError("Got the reward 'format'; expected `format:` and a regular expression behind it.")
    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise ConfigurationError(f"The reward 'format:{pattern:.80}' does not compile: {error}.") from error

    def check(sample: Sample) -> float | None:
        try:
            return float(compiled.search(sample.text[-_LONGEST:], timeout=_PATTERN_SECONDS) is not None)
        except TimeoutError:
            return None

    return check


PLAIN: dict[str, Check] = {"final_number": _number, "choice": _choice, "math": _math, "exact": _exact}
WITH_SETTING: dict[str, Callable[[str], Check]] = {"json": _json, "length": _length, "format": _format}
NAMES = (*PLAIN, "json", "json:<keys>", "length:<tokens>", "format:<pattern>")
