"""Answers in text: the right one, or none; never an exception, never executed code."""

from __future__ import annotations

import random
import time

import pytest

from distill_trainers.answers.formats import find_format
from distill_trainers.answers.verify import same_text
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.rationales import FORMATS, parse_response, verify_answer

CASES = [
    ("48 / 2 = 24.\n#### 1,024", (), "48 / 2 = 24.", "1,024"),
    ("So 2 + 2 = 4. The answer is 4.", (), "So 2 + 2 = 4.", "4"),
    ("It costs $3.50. So the answer is $3.50. Done.", (), "It costs $3.50.", "$3.50"),
    ("A. The answer is (84 / 2).\n\nQ: Next?\nA: The answer is 9.", (), "A.", "(84 / 2)"),
    ("The answer is 3? No. The final answer is: **7**", (), "The answer is 3? No.", "7"),
    (r"Thus \boxed{\frac{1}{2}}.", (), "Thus", r"\frac{1}{2}"),
    (r"\boxed{1} then \boxed{a{b}c} and \boxed{cut", (), r"\boxed{1} then", "a{b}c"),
    (r"x. The answer is $\boxed{\text{yes}}$.", (), "x.", r"\text{yes}"),
    (r"\boxed{\frac{1}{\boxed{2}}}", (), "", r"\frac{1}{{2}}"),
    ("We see. The answer is (b) bank.", ("choice",), "We see.", "B"),
    ("Options differ.\nAnswer: C", ("choice",), "Options differ.", "C"),
    ("Not (a) but (c)", ("choice",), "Not (a) but", "C"),
    ("sum => 12 <=", (r"regex:=> (\d+) <=",), "sum", "12"),
    ("The answer is ４２.", (), "", "４２"),
    ("no statement here, only 5", (), "no statement here, only 5", None),
    ("cut off: the answer is", (), "cut off: the answer is", None),
    ("#### Step 1\nAdd.\n#### Step 2\nSo \\boxed{5}", (), "#### Step 1\nAdd.\n#### Step 2\nSo", "5"),  # headings
    ("#### 42\n\nI hope this helps!", (), "", "42"),
    ("", (), "", None),
    ("####", (), "####", None),
]


@pytest.mark.parametrize("text, formats, rationale, answer", CASES)
def test_rationale_and_answer(text, formats, rationale, answer):
    found = parse_response(text, formats)
    assert (found.rationale, found.answer) == (rationale, answer)
    assert (found.format is None) == (answer is None)


def test_the_first_format_that_fits_decides():
    text = "The answer is 1.\n#### 2"
    assert parse_response(text, ["answer_is", "hash"]).answer == "1"
    assert parse_response(text, ["hash", "answer_is"]).answer == "2"


def test_unknown_formats_and_broken_patterns_are_refused():
    with pytest.raises(ConfigurationError, match="hash, boxed"):
        parse_response("x", ["hsah"])
    with pytest.raises(ConfigurationError, match="does not compile"):
        find_format("regex:(")


HOSTILE = [
    "The answer is __import__('os').system('touch executed').",
    "#### 9**9**9**9**9",
    "The answer is " + "9" * 50_000,
    r"\boxed{" * 20_000,
    "{" * 90_000 + "}" * 90_000,
    "the answer is " * 8_000,
    "The answer is " + "(" * 5_000 + "1",
    "The answer is ٤٢ or ⅷ or ½ or \U0001d7d8.",
    "\x00\ud800 The answer is \ufffd.",
    "The answer is 1/0.",
    "\n".join("Q:" for _ in range(10_000)),
    "(a)" * 30_000,
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_text_is_only_text(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    for name in FORMATS:
        parsed = parse_response(HOSTILE[number], [name])
        assert isinstance(parsed.rationale, str)
        for kind in ("auto", "number", "exact", "choice"):
            assert not verify_answer(parsed.answer, "42", kind, ["x", "42"] if kind == "choice" else None).right
    assert time.monotonic() - started < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 14_000 + "}" * 14_000,
        r"\boxed{$" * 12_000 + "$}" * 12_000,
        "The answer is " + "$" * 100_000,
        "The answer is " + "$'" * 50_000,
        "The answer is " + r"\(" * 25_000 + r"\)" * 25_000,
        "#### " + ".'" * 50_000,
        "#### " + "⁻" * 100_000,
        "#### " + "₍" * 100_000,
        "#### " + "9" * 100_000,
        r"#### \frac{1}{" * 10_000,
        "#### 1e999999999",
        "#### 9**9**9**9",
        "#### 1/0",
        "#### " + "(" * 90 + "1" + ")" * 90,
        "#### " + "-" * 190 + "1",
    ],
    ids=lambda text: text[:16],
)
def test_reading_an_answer_is_linear_in_its_length(text):
    """Boxes within boxes took 100 s, and many minus signs for powers or many `$` as long."""
    started = time.process_time()
    for name in FORMATS:
        answer = parse_response(text, [name]).answer
        for kind in ("number", "exact"):
            assert not verify_answer(answer, "42", kind).right
    same_text(text, "42")
    assert time.process_time() - started < 3


def test_random_text_never_raises():
    generator = random.Random(0)
    pieces = [
        "The answer is ",
        r"\boxed{",
        "}",
        "####",
        "{",
        "$",
        "(b)",
        "\n",
        "Q:",
        "1",
        ".",
        " ",
        "٣",
        "\\",
        "/",
        "-",
    ]
    for _ in range(3000):
        text = "".join(generator.choices(pieces, k=generator.randrange(14)))
        for name in FORMATS:
            verify_answer(parse_response(text, [name]).answer, "1", "number")


def test_a_pattern_of_the_users_has_a_time_limit():
    started = time.monotonic()
    assert parse_response("a" * 40 + "b", [r"regex:(a+a+)+$"]).answer is None
    assert time.monotonic() - started < 5
