"""Scores of text against values by hand and the libraries themselves."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from distill_trainers.evaluation.accuracy import answer_parser
from distill_trainers.evaluation.calibration import calibration_bins, calibration_sums
from distill_trainers.evaluation.consistency import agree, consistency_sums
from distill_trainers.evaluation.exposure import covered_length, exposure_curve, exposure_sums
from distill_trainers.evaluation.measures import MEASURES, METRICS, higher_is_better
from distill_trainers.evaluation.text_scores import (
    distinct_sums,
    ended_sums,
    length_sums,
    rouge_l,
    rouge_sums,
    self_bleu,
    self_bleu_sums,
)
from distill_trainers.exceptions import ConfigurationError

# ---- Rouge-L --------------------------------------------------------------------------------------------------------


def test_rouge_l_by_hand():
    """LCS of `the cat sat` and `the cat lay down` is 2 words: P 2/3, R 2/4, F = 4/7."""
    assert rouge_l(["the cat sat"], [["the cat lay down"]]) == [pytest.approx(400 / 7)]


def test_rouge_l_takes_the_best_reference_and_stems():
    assert rouge_l(["he runs"], [["nothing alike", "he running"]]) == [pytest.approx(100.0)]
    assert rouge_l(["", "a b"], [["a b"], ["a b"]]) == [0.0, pytest.approx(100.0)]


def test_rouge_is_averaged_over_seeds_then_prompts():
    sums = rouge_sums([[10.0, 50.0], [30.0, 70.0]])
    assert sums.per_prompt() == [20.0, 60.0] and sums.value == 40.0


# ---- Diversity ------------------------------------------------------------------------------------------------------


def test_distinct_n_counts_different_ngrams_of_all_completions_of_a_seed():
    completions = [[1, 2, 3, 4, 5], [1, 2, 3, 4], [7, 8]]  # 4-grams: 1234 2345 | 1234 | none
    sums = distinct_sums([completions])
    assert sums.value == pytest.approx(2 / 3)
    assert sums.per_prompt() == [pytest.approx(1.5 / 2), pytest.approx(0.5), None]
    assert distinct_sums([[[1, 1, 1, 1, 1, 1]]]).value == pytest.approx(1 / 3)


def test_distinct_n_of_several_seeds_compares_none_with_another():
    assert distinct_sums([[[1, 2, 3, 4]], [[1, 2, 3, 4]]]).value == 1.0


def test_distinct_n_against_a_count_of_sets():
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 3, draw.integers(2, 20)).tolist() for _ in range(30)]
    grams = [tuple(ids[i : i + 2]) for ids in texts for i in range(len(ids) - 1)]
    assert distinct_sums([texts], n=2).value == pytest.approx(len(set(grams)) / len(grams))


def test_self_bleu_against_sacrebleu():
    from sacrebleu import sentence_bleu

    texts = ["the cat sat on the mat", "the cat sat on a mat", "a dog ran over the green field"]
    by_hand = [
        sentence_bleu(text, [other for other in texts if other != text], use_effective_order=True).score
        for text in texts
    ]
    assert self_bleu(texts) == pytest.approx(sum(by_hand) / 3)


def test_self_bleu_of_equal_and_of_unlike_samples():
    same, unlike = ["one two three four five"] * 2, ["one two three four five", "six seven eight nine ten"]
    assert self_bleu(same) == pytest.approx(100.0) and self_bleu(unlike) < 10
    sums = self_bleu_sums([[same[0], unlike[0]], [same[1], unlike[1]]])
    assert sums.value == pytest.approx((100 + self_bleu(unlike)) / 2)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["", ""], 100.0),  # all alike: it was 0, "most diverse"
        (["", " \n", ""], 100.0),
        (["", "one two three four"], 0.0),
        (["one two three four", "one two three four", ""], 200 / 3),
        (["", "", "one two three four"], 200 / 3),
        ([".", "."], 100.0),
        (["one", "one"], 100.0),
    ],
)
def test_self_bleu_of_texts_without_words(texts, expected):
    assert self_bleu(texts) == pytest.approx(expected)
    assert self_bleu_sums([[text] for text in texts]).value == pytest.approx(expected)


def test_lengths_count_the_end_and_ends_are_told_by_their_token():
    by_seed = [[[5, 6, 1], [5]], [[1], [5, 6, 7]]]
    assert length_sums(by_seed).value == pytest.approx((3 + 1 + 1 + 3) / 4)
    assert ended_sums(by_seed, [1]).value == pytest.approx(2 / 4)
    assert ended_sums([[[]]], [1]).value == 0.0


# ---- Consistency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "share", "right"),
    [
        (["4", "4.0", "5", None], 2 / 4, True),
        (["5", "5", "4", "5"], 3 / 4, False),
        (["4", "5", "4", "5"], 2 / 4, False),  # a tie has no majority
        ([None, None], 0.0, False),
        (["4"], 1.0, True),
    ],
)
def test_consistency(answers, share, right):
    found = agree(answers, "4")
    assert (found.share, found.right) == (pytest.approx(share), right)


def test_consistency_of_a_set():
    sums = consistency_sums([agree(["1", "1"], "1"), agree(["1", "2"], "1")])
    assert sums["consistency"].value == 0.75 and sums["majority_accuracy"].value == 0.5


def test_choices_agree_by_letter_and_text():
    assert agree(["b", "(B)", "green"], "B", "choice", ["red", "green"]).share == 1.0


def test_answers_by_format_or_first_line():
    assert answer_parser(["hash"])("x\n#### 4") == "4" and answer_parser(["hash"])("4") is None
    assert answer_parser(["first_line"])(" 42.\nmore") == "42"
    assert answer_parser(["hash", "first_line"])("x\n#### 4") == "4"
    assert answer_parser(["hash", "first_line"])("7\nmore") == "7"
    with pytest.raises(ConfigurationError, match="hsh"):
        answer_parser(["hsh", "first_line"])


# ---- Calibration ----------------------------------------------------------------------------------------------------


def test_ece_by_hand():
    """Bins (0.5, 1]: confidence 0.8, 0.6, accuracy 1/2; (0, 0.5]: confidence 0.4, accuracy 1."""
    sums = calibration_sums([[0.8, 0.4], [0.6]], [[1, 1], [0]], bins=2)
    assert sums.value == pytest.approx(2 / 3 * abs(0.5 - 0.7) + 1 / 3 * abs(1 - 0.4))
    assert sums.per_prompt() == []
    low, high = calibration_bins([[0.8, 0.4], [0.6]], [[1, 1], [0]], bins=2)
    assert (low.tokens, low.confidence, low.accuracy) == (1, pytest.approx(0.4), 1.0)
    assert (high.tokens, high.confidence, high.accuracy) == (2, pytest.approx(0.7), 0.5)


def test_ece_borders_belong_to_the_lower_bin_and_one_to_the_last():
    tokens = [bin.tokens for bin in calibration_bins([[0.0, 0.5, 0.51, 1.0]], [[0, 0, 0, 1]], bins=2)]
    assert tokens == [2, 2]


def test_a_calibrated_model_has_little_ece_and_a_sure_one_much():
    draw = np.random.default_rng(0)
    sure = draw.uniform(0.1, 1.0, 20000)
    right = (draw.uniform(size=20000) < sure).astype(float)
    assert calibration_sums([sure], [right], 10).value < 0.02
    assert calibration_sums([np.ones(20000)], [right], 10).value == pytest.approx(1 - right.mean())


# ---- Exposure bias --------------------------------------------------------------------------------------------------


def test_excess_error_by_hand():
    """R(2) = 1.5 + 2 = 3.5 on own text, E(2) = 1 + 1.5 = 2.5 on the teacher's; position 3 is not looked at."""
    own, given = [[1.0, 2.0, 99.0], [2.0, 2.0]], [[1.0, 1.5], [1.0, 1.5, 99.0]]
    sums = exposure_sums(own, given, 2)
    assert sums.value == pytest.approx(100 * (3.5 - 2.5) / 2.5)
    assert exposure_curve(sums) == [pytest.approx(50.0), pytest.approx(40.0)]


def test_a_position_is_averaged_over_completions_that_reach_it():
    sums = exposure_sums([[1.0], [3.0, 5.0]], [[2.0, 4.0], [2.0]], 2)
    assert sums.value == pytest.approx(100 * ((2 + 5) - (2 + 4)) / (2 + 4))


def test_no_error_no_excess():
    assert exposure_sums([[0.0, 0.0]], [[0.0]], 2).value == 0.0
    assert exposure_curve(exposure_sums([[1.0]], [[0.0]], 1)) == [None]


def test_how_far_enough_completions_reach():
    assert covered_length([[[0] * n for n in (1, 2, 3, 4)], [[0] * n for n in (9, 9, 9, 9)]]) == 3
    assert covered_length([[[0] * 5]]) == 5 and covered_length([[[], []]]) == 1


# ---- The table of measures ------------------------------------------------------------------------------------------


def test_every_metric_has_measures_and_directions():
    assert {measure.metric for measure in MEASURES.values()} | {"speed"} == set(METRICS)
    assert higher_is_better("eval_rouge_l") and not higher_is_better("eval_self_bleu")
    assert not higher_is_better("eval_teacher_perplexity") and not higher_is_better("eval_student_text_jsd")
    assert higher_is_better("eval_gap_closed_reverse_kl") and higher_is_better("eval_gap_closed_rouge_l")
    assert not higher_is_better("eval_loss") and higher_is_better("eval_something_of_yours")
    assert all(measure.over in ("texts", "prompts", "references", "questions") for measure in MEASURES.values())


def test_notes_of_what_is_missing_name_no_folder_of_this_machine(monkeypatch):
    """They go into evaluation.json and reports, which are passed on."""
    from distill_trainers import installing
    from distill_trainers.evaluation.choosing import choose_metrics
    from distill_trainers.evaluation.settings import EvaluationSettings

    monkeypatch.setattr(installing, "_origin", lambda: ("/home/me/clone", "", True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    subsets = {name: [0] for name in ("texts", "prompts", "references", "questions")}
    _, notes = choose_metrics(EvaluationSettings(), SimpleNamespace(subsets=subsets), has_teacher=True)
    assert any("rouge_score, of the extra `evaluation`, is not installed" in note for note in notes)
    assert "/home/me" not in " ".join(notes)
