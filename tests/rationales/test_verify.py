"""Right or wrong: numbers, expressions, choices, text, votes."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import unicodedata
from fractions import Fraction
from pathlib import Path

import pytest

from distill_trainers.answers import symbolic as symbolic_module
from distill_trainers.answers.numbers import as_number
from distill_trainers.answers.symbolic import SymbolicEquality, is_available
from distill_trainers.answers.verify import final_number, same_text
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.rationales import majority_answer, verify_answer

needs_math_verify = pytest.mark.skipif(not is_available(), reason="math-verify is not installed")


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("1,024", "1024", True),
        ("1024.0", "1024", True),
        ("$18", "18", True),
        ("18 dollars per day", "18", True),
        ("x = 18", "18", True),
        ("50%", "50", True),
        ("(84 / 2)", "( 84.0 / 2.0 )", True),
        ("(16 * 17) * 4", "( ( 4.0 * 17.0 ) * 16.0 )", True),
        ("-(3 - 5)", "2", True),
        ("1/3", "0.3333333", True),
        ("0.1 + 0.2", "0.3", True),
        ("４２", "42", True),
        ("٤٢", "42", True),
        ("−7", "-7", True),
        ("1e3", "1000", True),
        ("3,4", "34", False),
        ("-5", "5", False),
        ("5x", "5", False),
        ("5 million dollars", "5", False),
        ("2 Dozen", "2", False),
        ("2 thirds", "2", False),
        ("2 or 3", "2", False),
        ("1/3", "0.33", False),
        ("9**9**9", "9", False),
        ("7 // 2", "3", False),
        ("1/0", "0", False),
        ("1000001", "1000000", False),  # whole numbers are exact
        ("111111102.0", "111111100", False),
        ("1234567.89", "1234567.12", False),
        ("33333333.33", "100000000/3", True),
        ("0.0000001", "0.0000009", False),
        ("9" * 400, "9" * 400, True),  # as text
        ("9" * 400, "9" * 399 + "8", False),
    ],
)
def test_numbers(answer, reference, right):
    assert verify_answer(answer, reference, "number").right is right


SCALED = {
    "5 tenths": "1/2",
    "5 hundredths": "0.05",
    "5 thousandths": "0.005",
    "3 halves": "1.5",
    "1 half": "0.5",
    "2 thirds of it": "2/3",
    "5 bn": "5000000000",
    "$5bn": "5000000000",
    "5 lakh": "500000",
    "5 crores": "50000000",
    "5 lakh crore": "5000000000000",
    "5 grand": "5000",
    "5 dozen": "60",
    "5 dozen eggs": "60",
    "5k": "5000",
    "5M": "5000000",
    "$2.5 million": "2500000",
    "2.5 Million dollars per year": "2500000",
    "1,000 thousand": "1000000",
    "5 hundred": "500",
}
UNITS = [
    "5 per cent",
    "5%",
    "5 points",
    "5 times",
    "5 seconds",
    "5 ms",
    "5 kg",
    "5 days to go",
    "5 feet tall",
    "5 miles",
]
NO_NUMBER = ["half of 5", "5 fifth", "5 quarters", "5 pi", "5 squared", "5 cubed", "5 and a half", "5 mil", "5 score"]
NO_NUMBER += [
    "5 thousand two hundred",
    "5 hundred thousandths",
    "5 plus two",
    "5 or six",
    "5 grand pianos",
    "5 root two",
]
NO_NUMBER += ["5 dollars and fifty cents", "5 % of ten", "5m", "5 cups and half", "5 point two", "5 root two"]


@pytest.mark.parametrize(("answer", "number"), SCALED.items())
def test_words_that_scale_a_number(answer, number):
    for kind in ("number", "math", "auto") if is_available() else ("number",):
        assert verify_answer(answer, number, kind).right and not verify_answer(answer, "5", kind).right
    assert as_number(answer) == Fraction(number)


@pytest.mark.parametrize("answer", UNITS)
def test_words_that_are_a_unit(answer):
    assert as_number(answer) == 5


@pytest.mark.parametrize("answer", NO_NUMBER)
def test_words_that_change_a_number_in_a_way_that_is_not_read(answer):
    assert as_number(answer) is None and not verify_answer(answer, "5", "number").right


@pytest.mark.parametrize(
    "answer, reference, right",
    [("The River-bank!", "river bank", False), ("the Bank.", "Bank", True), ("a", "a", True), ("!", "?", False)],
)
def test_text(answer, reference, right):
    assert verify_answer(answer, reference, "exact").right is right


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("B", "bank", True),
        ("(b)", "B", True),
        ("B) bank", "b", True),
        ("bank", "(B)", True),
        ("river", "B", False),
        ("Z", "B", False),
        ("somewhere", "bank", False),
    ],
)
def test_choices(answer, reference, right):
    found = verify_answer(answer, reference, choices=["river", "bank", "sea"])
    assert found.right is right and found.how == "choice"


def test_no_answer_is_its_own_reason():
    assert verify_answer(None, "1").reason == "no answer" == verify_answer("  ", "1").reason


@needs_math_verify
@pytest.mark.parametrize(
    "answer, reference, right",
    [
        (r"\frac{1}{2}", "0.5", True),
        ("x+1", "1+x", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        (r"\frac{1}{3}", "0.5", False),
        ("x+1", "x+2", False),
    ],
)
def test_expressions(answer, reference, right):
    found = verify_answer(answer, reference, "math")
    assert found.right is right


@needs_math_verify
def test_an_endless_expression_costs_its_time_limit_and_nothing_else():
    symbolic = SymbolicEquality(seconds=1.0)
    assert symbolic("x+1", "1+x") is True
    started = time.monotonic()
    found = verify_answer("9^{9^{9^{9}}}", "1", "math", symbolic=symbolic)
    assert found.reason == "undecided" and not found.right
    assert time.monotonic() - started < 10 and symbolic.timeouts == 1
    assert symbolic("x+1", "1+x") is True
    symbolic.close()


@needs_math_verify
def test_each_endless_expression_costs_no_more_than_its_time_limit():
    """The process of the next one is there at once: importing sympy anew took seconds, and was allowed a minute."""
    symbolic = SymbolicEquality(seconds=0.3)
    assert symbolic("x+1", "1+x") is True
    started = time.monotonic()
    for expression in ("9^{9^{9^{9}}}", "2^{10^{10}}", "1000000!!", r"\sum_{i=1}^{10^{12}} i^i", "{" * 400):
        assert symbolic(expression, "1+x") is None
        assert symbolic("x+1", "1+x") is True
    assert time.monotonic() - started < 5 * 2
    assert symbolic.timeouts == 5
    symbolic.close()


@needs_math_verify
def test_a_batch_of_endless_expressions_has_a_budget(caplog):
    symbolic = SymbolicEquality(seconds=0.6, budget=1.0)
    assert symbolic("x+1", "1+x") is True
    started = time.monotonic()
    assert [symbolic("9^{9^{9^{9}}}", str(number)) for number in range(10)] == [None] * 10
    assert time.monotonic() - started < 2 * 0.6 + 8 * 0.4
    assert symbolic("x+1", "1+x") is True
    symbolic.close()
    assert len([record for record in caplog.records if "undecided" in record.message]) == 1


@needs_math_verify
def test_a_system_without_forks_and_alarms_compares_too(tmp_path, monkeypatch):
    """As Windows is one."""
    program = Path(symbolic_module.__file__).with_name("symbolic_process.py").read_text()
    future, _, rest = program.partition("import annotations\n")
    lacks = "import os, signal, sys\nsys.modules['resource'] = None\ndel os.fork, signal.SIGALRM, signal.setitimer\n"
    (tmp_path / "symbolic_process.py").write_text(f"{future}import annotations\n{lacks}{rest}")
    monkeypatch.setattr(symbolic_module, "__file__", str(tmp_path / "symbolic.py"))
    monkeypatch.setattr(symbolic_module, "_GRACE", 0.5)
    monkeypatch.delattr(os, "killpg")
    symbolic = SymbolicEquality(seconds=1.0, start_seconds=120.0)
    assert symbolic("x+1", "1+x") is True
    process = symbolic._process
    assert symbolic("9^{9^{9^{9}}}", "1") is None and symbolic.timeouts == 1
    assert process.poll() is not None
    symbolic.close()


def _is_alive(pid):
    try:
        return (Path("/proc") / pid / "stat").read_text().rpartition(") ")[2][0] != "Z"  # ended, its parent too
    except FileNotFoundError:
        return False


@needs_math_verify
def test_the_process_that_compares_is_isolated(tmp_path, monkeypatch):
    (tmp_path / "planted").mkdir()
    for name in ("sitecustomize", "usercustomize", "sympy", "json", "math_verify"):
        (tmp_path / "planted" / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "planted" / "json.py"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path / "planted")
    symbolic = SymbolicEquality()
    assert symbolic("x+1", "1+x") is True
    assert not (tmp_path / "ran").exists()
    process = Path("/proc", str(symbolic._process.pid))
    workers = (process / "task" / str(symbolic._process.pid) / "children").read_text().split()
    for inside in (process, *(Path("/proc", worker) for worker in workers)):
        environment = (inside / "environ").read_text().split("\0")
        assert {entry.partition("=")[0] for entry in environment if entry} <= {"LD_LIBRARY_PATH"}
        assert (inside / "cwd").readlink() == Path("/")
        limits = dict(re.findall(r"^Max (.*?)  +(\S+)", (inside / "limits").read_text(), re.MULTILINE))
        assert limits["file size"] == limits["core file size"] == "0"
        assert int(limits["address space"]) <= 4 * 2**30
    symbolic.close()
    deadline = time.monotonic() + 30
    while any(map(_is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(_is_alive, workers))


@needs_math_verify
def test_a_process_that_is_gone_is_started_again():
    symbolic = SymbolicEquality()
    assert symbolic("x+1", "1+x") is True
    os.kill(symbolic._process.pid, signal.SIGKILL)
    symbolic._process.wait()
    assert symbolic("x+1", "1+x") is True
    symbolic.close()


@needs_math_verify
def test_any_thread_may_compare():
    """math-verify's own time limit is a signal, which only a main thread may set."""
    symbolic, found = SymbolicEquality(), []
    threads = [threading.Thread(target=lambda: found.append(symbolic("x*2", "2*x"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    symbolic.close()
    assert found == [True] * 3


def test_kinds_are_checked(monkeypatch):
    with pytest.raises(ConfigurationError, match="auto, number"):
        verify_answer("1", "1", "numbr")
    monkeypatch.setattr("distill_trainers.answers.symbolic.is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="rationales"):
        verify_answer("x", "y", "math")


def test_majority():
    assert majority_answer(["4", "5", "4.0", None]) == ("4", 0.5)
    assert majority_answer(["4", "5"]) == (None, 0.0)
    assert majority_answer([None, None]) == (None, 0.0)
    assert majority_answer(["(a)", "river", "B"], choices=["river", "bank"]) == ("(a)", 2 / 3)


@pytest.mark.parametrize(
    "text, number",
    [
        ("So she has 3 + 4 = 7 apples.\n#### 7", 7),
        ("#### 1,250", 1250),
        ("It costs $1,250.50.", Fraction("1250.5")),
        ("from 5 to −3", -3),
        ("the answer is -12.", -12),
        ("#### x\n", None),
        ("no number", None),
        ("in 2020, he was 41 years old", 41),
        ("#### 1/2", Fraction(1, 2)),
        ("that makes 1/3", Fraction(1, 3)),
        ("version 1.2.3", None),
        ("it is 2^10", None),
        ("5-3", None),
        ("it costs 5 million in all", 5_000_000),
        ("she sold 5 dozen eggs", 60),
        ("that makes $5k.", 5000),
        ("5 tenths, then", Fraction(1, 2)),
        ("the area is 5 squared", None),
        ("it is 5 years old", 5),
    ],
)
def test_final_numbers(text, number):
    """Part of a term is no answer: 5-3 does not say 3, nor 2^10 ten."""
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["5²", "10⁻³", "5₂", "4 fifteenths", "3 thirtieths", "5 Millionen"]
    + ["5 millones", "4 twos", "5 twenties", "5 tenfold", "$5 MM", "5 permille", "5 double", "5 Tsd"],
)
def test_what_changes_a_number_in_a_way_that_is_not_read_is_no_number(text):
    assert as_number(text) is None
    digits = "".join(c for c in unicodedata.normalize("NFKC", text) if c.isdigit())
    assert not verify_answer(text, digits, "number").right and not verify_answer(text, digits[:1]).right
    assert final_number(f"so we get {text}") is None


def test_raised_digits_are_powers_in_texts_too():
    assert same_text("x²", "x^2") and not same_text("x²", "x2") and not same_text("a₁", "a1")
    assert as_number("5 mm") == as_number("5 scarves") == 5


@pytest.mark.parametrize(
    "text", ["5²", "10¹²", "5⁻²", "5₂", "5½", "5 twofold", "5 zillion", "5 sqrt", "5 thousand 200"]
)
def test_what_is_raised_lowered_or_mixed_is_no_plain_number(text):
    """NFKC alone would make 52 of 5², and 51/2 of 5½."""
    assert as_number(text) is None
    assert final_number(f"It is 7. Then it is {text}.") in (None, 7)


@pytest.mark.parametrize(
    "text, value",
    [
        ("½", "1/2"),
        ("¾ of it", None),
        ("5⁄2", "5/2"),
        ("5 quintillion", "5000000000000000000"),
        ("5 quadrillionths", "1/200000000000000"),
        (r"5\text{ million}", "5000000"),
        (r"5\,\text{squared}", None),
        (r"5\%", "5"),
        (r"\$5", "5"),
        (r"\frac{1}{2}", "1/2"),
        (r"-\dfrac{1}{2}", "-1/2"),
        (r"2\frac{1}{2}", None),
    ],
)
def test_fractions_large_scales_and_latex_are_read(text, value):
    assert as_number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    "text",
    [
        "so it is 10².",
        "got 5 × 10^6",
        "got 5·10⁶",
        "it was 5 thousand 200",
        "5 hundred and 20",
        "5½ apples",
        "5 1/2 cups",
        "-5 1/2",
        r"x = 2\frac{1}{2}",
        r"x = \frac{1+\pi}{2}",
        r"x = \sqrt{2}",
        r"x = 3 \sqrt[3]{2}",
        "So it is 5 x 10^3.",
        r"x = 5 \cdot 10^3",
        "5 * 10 ** 3",
        r"x = 5 \times 10^{3}",
        "$5 M",
        "5 k",
        "5 ½ cups",
        "5‰",
        "5 per mille",
        "5 ± 1",
        "so 5 000",
    ],
)
def test_the_last_number_is_whole_or_none(text):
    assert final_number(text) is None


@pytest.mark.parametrize("text", [r"3 of 4, so x = \frac{3}{4}", r"so \boxed{\tfrac{3}{4}}", "3 of 4, so 3/4"])
def test_the_last_number_may_be_a_fraction(text):
    assert final_number(text) == Fraction(3, 4)


def test_powers_and_indices_stay_apart_from_digits():
    for one, other in [("x²", "x2"), ("5²", "52"), (r"5\text{ million}", "5")]:
        assert not verify_answer(one, other, "number").right
    assert verify_answer("x²", "x^2", "exact").right
