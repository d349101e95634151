"""The convergence gate: every method must teach two-digit addition to a student from its teacher's answers alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from distill_trainers.cli import proof
from distill_trainers.toy import addition_accuracy, addition_rows, fit_on_gold, tiny_llama

ROWS = addition_rows()
TRAIN, HELD_OUT = ROWS[: -proof.HELD_OUT], ROWS[-proof.HELD_OUT :]


@pytest.fixture(scope="module")
def adder(tokenizer, tmp_path_factory) -> Any:
    """A teacher that adds: about 45 seconds."""
    model = tiny_llama(tokenizer)
    fit_on_gold(model, tokenizer, TRAIN, proof.TEACHER_STEPS, output_dir=str(tmp_path_factory.mktemp("adder")))
    assert addition_accuracy(model, tokenizer, HELD_OUT) > 0.9
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("title", "method", "settings"), proof.PROOFS, ids=[row[0] for row in proof.PROOFS])
def test_a_student_learns_addition_from_its_teacher(adder, tokenizer, tmp_path, title, method, settings):
    student = tiny_llama(tokenizer, 48, 2, seed=1)
    kl = proof.distill(student, adder, tokenizer, TRAIN, HELD_OUT, method, settings, tmp_path, proof.STEPS)
    assert addition_accuracy(student, tokenizer, HELD_OUT) > 0.85
    assert kl < 0.2


@pytest.mark.slow
def test_few_right_answers_do_not_suffice(tokenizer, tmp_path):
    """Without this the gate would pass for a task that needs no teacher."""
    student = tiny_llama(tokenizer, 48, 2, seed=1)
    few = TRAIN[: proof.GOLD_ROWS]
    fit_on_gold(
        student, tokenizer, few, proof.STEPS, learning_rate=proof.LEARNING_RATE, output_dir=str(tmp_path / "few")
    )
    assert addition_accuracy(student, tokenizer, HELD_OUT) < 0.6


@pytest.mark.slow
def test_the_command_prints_a_table(tmp_path, capsys, monkeypatch):
    """A run too short to learn anything still goes through every row."""
    monkeypatch.setattr(proof, "HELD_OUT", 4)
    try:
        assert proof.main(["--output-dir", str(tmp_path), "--steps", "1", "--teacher-steps", "1"]) == 0
    finally:
        logging.disable(logging.NOTSET)
    shown = capsys.readouterr().out
    for title in ["Teacher", "no teacher", *(row[0] for row in proof.PROOFS)]:
        assert title in shown
