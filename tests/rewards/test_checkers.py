"""What a completion is worth to each built-in checker."""

from __future__ import annotations

import pytest

from distill_trainers.answers.checkers import Sample, checker, reads_answer
from distill_trainers.exceptions import ConfigurationError, DatasetError

RIGHT, WRONG = 1.0, 0.0


@pytest.mark.parametrize(
    ("name", "text", "answer", "worth"),
    [
        ("final_number", "3 + 4 is 7, so 7 apples.\n#### 7", "3 + 4 = 7\n#### 7", RIGHT),
        ("final_number", "first 12, then 1,200", "1200", RIGHT),
        ("final_number", "The answer is 7. I am 8 years old.", "7", RIGHT),
        ("final_number", "7 or 8", "7", WRONG),
        ("final_number", "seven", "7", WRONG),
        ("final_number", "", "7", WRONG),
        ("choice", "So the answer is (b).", "B", RIGHT),
        ("choice", "A", "B", WRONG),
        ("exact", " the Paris. ", "Paris", RIGHT),
        ("exact", "Paris, I think", "Paris", WRONG),
        ("exact", "95", "95", RIGHT),
        ("exact", "9 5", "95", WRONG),
        ("json", '{"a": 1}', None, RIGHT),
        ("json", '```json\n{"a": [1, 2]}\n```', None, RIGHT),
        ("json", '{"a": 1', None, WRONG),
        ("json", "[" * 100_000, None, WRONG),
        ("json:a,b", '{"a": 1, "b": null, "c": 2}', None, RIGHT),
        ("json:a,b", '{"a": 1}', None, WRONG),
        ("json", '{"a": NaN}', None, WRONG),
        ("json:a", '["a"]', None, WRONG),
        ("format:^<think>.*</think>\\s*\\d+$", "<think>well\nwell</think>\n42", None, RIGHT),
        ("format:^<think>.*</think>\\s*\\d+$", "42", None, WRONG),
    ],
)
def test_worth(name, text, answer, worth):
    assert checker(name)(Sample(text, answer=answer)) == worth


def test_a_choice_may_be_named_by_its_text():
    check = checker("choice")
    assert check(Sample("red", answer="B", choices=["blue", "red"])) == RIGHT
    assert check(Sample("blue", answer="B", choices=["blue", "red"])) == WRONG


def test_math_compares_expressions():
    pytest.importorskip("math_verify")
    check = checker("math")
    assert check(Sample("thus \\boxed{\\frac{1}{2}}", answer="0.5")) == RIGHT
    assert check(Sample("x\n2x + x", answer="3x")) == RIGHT
    assert check(Sample("4x", answer="3x")) == WRONG


def test_length_falls_from_the_limit_to_twice_of_it():
    worth = [checker("length:4")(Sample("", tokens)) for tokens in (0, 4, 5, 6, 8, 100)]
    assert worth == [1, 1, 0.75, 0.5, 0, 0]


def test_a_pattern_that_does_not_end_is_undecided():
    assert checker("format:(a|a)*$(?<=b)c")(Sample("a" * 5000)) in (None, WRONG)
    assert checker("format:^(a+)+$")(Sample("a" * 40 + "b")) in (None, WRONG)


def test_an_answer_that_is_no_number_is_named():
    with pytest.raises(DatasetError, match="'many'.*final_number.*take `exact`"):
        checker("final_number")(Sample("7", answer="many"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nonsense", "'nonsense'.*final_number, choice, math, exact"),
        ("exact:5", "`exact` alone"),
        ("length", "number of tokens"),
        ("length:-3", "number of tokens"),
        ("format:", "regular expression"),
        ("format:(", "does not compile"),
    ],
)
def test_refusals(name, said):
    with pytest.raises(ConfigurationError, match=said):
        checker(name)


def test_which_read_an_answer():
    assert [reads_answer(name) for name in ("exact", "math", "json", "length:3")] == [True, True, False, False]
