"""Numbers as people and models write them, exactly and without evaluating anything."""

from __future__ import annotations

import ast
import math
import operator
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

_LONGEST = 200  # characters of anything that is read as a number

_NUMBER = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d{1,2})?"
_PLAIN = re.compile(_NUMBER)
_RATIO = re.compile(r"([+-]?\d+) ?/ ?(\d+)")
_WITH_WORDS = re.compile(r"(?:[A-Za-z]+ = )?[$€£¥]?(" + _NUMBER + r")(k|K|M|[bt]n|)(?: ?%)?((?: [A-Za-z]{2,}\.?)*)")
# Words behind a number that multiply it, with or without an s.
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "grand": 10**3, "lakh": 10**5, "lac": 10**5, "crore": 10**7}
_SCALES |= {"million": 10**6, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15}
_SCALES |= {"quintillion": 10**18, "sextillion": 10**21, "septillion": 10**24, "octillion": 10**27}
_SCALES |= {"nonillion": 10**30, "decillion": 10**33, "arab": 10**9, "kharab": 10**11}
_SCALES |= {"mn": 10**6, "mln": 10**6, "bn": 10**9, "tn": 10**12, "trn": 10**12}
_LETTERS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "bn": 10**9, "tn": 10**12}  # right behind it; 5m are metres
_PARTS = {"half": 2, "halve": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9}
_PARTS |= {"tenth": 10, "eleventh": 11, "twelfth": 12, "sixteenth": 16, "twentieth": 20}
_PARTS |= {f"{name}th": scale for name, scale in _SCALES.items() if name.endswith(("hundred", "thousand", "illion"))}
# Those that may change it in a way that is not read here. All other words are its unit.
_UNREAD = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety twos threes fours fives sixes sevens
eights nines tens twenties thirties forties fifties sixties seventies eighties nineties score gross myriad myriads mil
mill mille permille mio mia mrd thou tsd tausend googol bil tril cr quarter quarters squared cubed root factorial pi
double doubled triple tripled quadruple quintuple halved twice thrice fold twofold threefold fourfold fivefold sixfold
tenfold sqrt recurring repeating negative zillion zillions gazillion gazillions milion bilion trilion wan oku"""
_UNREAD_WORDS = frozenset(_UNREAD.split())
# Quintillion, milliards, Millionen, millones; fifteenths and fortieths; tenfold.
_UNREAD_FORMS = re.compile(r"\w{0,12}illi?(?:on|ard)\w{0,8}|\w{1,12}(?:teen|ie)ths?|\w{1,12}fold")
CHANGING_WORDS = "|".join([*(f"{name}s?" for name in (*_SCALES, *_PARTS)), *sorted(_UNREAD_WORDS - {"one", "score"})])
CHANGING_WORDS += f"|{_UNREAD_FORMS.pattern}"

_ARITHMETIC = re.compile(r"[\d\s.+\-*/()]+")
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


# Looked for from the first sign only: from each of many signs the rest would be read anew.
_RAISED = re.compile("(?<![⁺⁻⁽])[⁺⁻⁽]*[⁰¹²³⁴-⁹ⁿⁱ]+[⁾]?")
_LOWERED = re.compile("(?<![₊₋₍])[₊₋₍]*[₀-₉]+[₎]?")
_VULGAR = re.compile("(?<=[^ ])(?=[¼-¾⅐-⅞↉])")  # the place between the two of 5½, which are not 51/2
_FRAC = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")  # a space before it, so that 2\frac{1}{2} is not 21/2
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}")


def normalised(text: str) -> str:
    """Unify compatible characters (full-width and other scripts' digits become ASCII) and spaces.

    What is raised stays a power (5² is 5^2 and not 52), what is lowered an index, and ½ is 1/2.
    """
    text = _VULGAR.sub(" ", _LOWERED.sub(r"_\g<0>", _RAISED.sub(r"^\g<0>", text)))
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("×", "*").replace("÷", "/").replace("⁄", "/")
    digits = (str(unicodedata.digit(c)) if not c.isascii() and c.isdecimal() else c for c in text)
    return " ".join("".join(digits).split())


def as_number(text: str) -> Fraction | None:
    """Return the number that `text` is, or None.

    Read are integers, decimals, thousands with commas, fractions, a unit or currency around one number (`$18`, `18
    dollars`, `50 %`, whose sign counts as a unit), words and letters that scale it (`2.5 million`, `5 tenths`, `5k`),
    and + − · / with parentheses over numbers. Powers are not, so that nothing grows beyond what was written; nor are
    words that change a number in another way (`5 squared`, `5 plus two`).
    """
    if len(text) > 2 * _LONGEST:
        return None
    text = _FRAC.sub(r" \1/\2", _TEXT.sub(r" \1 ", text))
    text = normalised(text.replace(r"\%", "%").replace(r"\$", "$")).rstrip(".")
    if not text or len(text) > _LONGEST or not any(c.isdigit() for c in text):
        return None
    ratio = _RATIO.fullmatch(text)
    if ratio:
        return Fraction(int(ratio[1]), int(ratio[2])) if int(ratio[2]) else None
    if _PLAIN.fullmatch(text):
        return _fraction(text)
    single = _WITH_WORDS.fullmatch(text)
    if single:
        number = _fraction(single[1])
        return None if number is None else _scaled(number * _LETTERS[single[2]], single[3].replace(".", "").split())
    return _arithmetic(text) if _ARITHMETIC.fullmatch(text) else None


def _scaled(number: Fraction, words: list[str]) -> Fraction | None:
    """The number times what the words behind it say, its unit behind them; None where they change it otherwise."""
    scales: list[Fraction] = []
    parts: list[Fraction] = []
    has_unit = False
    for written in words:
        word = written.lower()
        name = word.removesuffix("s")
        if name in _SCALES and not has_unit:
            scales.append(Fraction(_SCALES[name]))
        elif name in _PARTS and not has_unit and (number == 1 or name != word):  # 5 fifths, but no 5 fifth
            parts.append(Fraction(1, _PARTS[name]))
        elif name in _SCALES or name in _PARTS or _is_unread(word) or written == "MM":  # millions, not millimetres
            return None
        else:
            has_unit = True
    # Who knows whether `5 hundred thousandths` are 0.5 or 0.00005, and `5 grand pianos` are five.
    if len(parts) + bool(scales) > 1 or (has_unit and words[0].lower() == "grand"):
        return None
    return number * math.prod(scales + parts)


def _is_unread(word: str) -> bool:
    return word in _UNREAD_WORDS or _UNREAD_FORMS.fullmatch(word) is not None


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
