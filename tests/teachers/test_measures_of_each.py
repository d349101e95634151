"""Measures of held-out prompts with several teachers: each has scores, and a gap, of its own rows."""

import json

import pytest
from datasets import Dataset

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.toy import addition_rows

NAMES = ("math", "code")
MEASURES = ["agreement", "rouge_l", "diversity", "exposure_bias"]
SETTINGS = {"lmbda": 0.0, "eval_measures": MEASURES, "eval_measures_rows": 9, "seed": 3}


def rows(count, seed=0):
    """Two rows of `math`, then one of `code`."""
    problems = enumerate(addition_rows(count, seed=seed))
    return Dataset.from_list([{**row, "teacher": NAMES[i % 3 == 2]} for i, row in problems])


@pytest.fixture
def made(make_trainer, make_student, make_teacher):
    def trainer(names=NAMES, **settings):
        teachers = {"math": make_teacher(), "code": make_teacher(seed=8)}
        teacher = {name: teachers[name] for name in names} if len(names) > 1 else teachers[names[0]]
        data = {"train": rows(24), "eval_dataset": rows(9, seed=5)}
        if len(names) == 1:
            data = {key: part.filter(lambda row: row["teacher"] == names[0]) for key, part in data.items()}
            data = {key: part.remove_columns("teacher") for key, part in data.items()}
        return make_trainer(make_student(), teacher, **{**data, **SETTINGS, **settings})

    return trainer


def test_scores_of_a_teacher_are_those_of_a_run_with_it_alone_on_its_rows(made):
    found = made().evaluate()
    of_all = {name for name in found if "/" not in name}
    for name in NAMES:
        alone = made([name]).evaluate()
        compared = [key for key in alone if key.startswith("eval_") and f"{key}/{name}" in found]
        scored = {"eval_student_text_jsd", "eval_exposure_error", "eval_rouge_l", "eval_teacher_rouge_l", "eval_kl"}
        assert scored | {"eval_teacher_distinct_4"} <= set(compared)
        for key in compared:
            assert found[f"{key}/{name}"] == pytest.approx(alone[key], rel=1e-5), key
    assert {"eval_student_text_jsd", "eval_rouge_l", "eval_teacher_rouge_l"} <= of_all
    tokens = {name: found[f"eval_completion_tokens/{name}"] for name in NAMES}
    assert found["eval_completion_tokens"] == pytest.approx((6 * tokens["math"] + 3 * tokens["code"]) / 9)


def test_the_gap_of_each_is_counted_from_its_own_start(made, tmp_path):
    trainer = made(max_steps=4, eval_strategy="steps", eval_steps=4, learning_rate=0.02)
    trainer.train()
    (logged,) = (row for row in trainer.state.log_history if "eval_loss" in row)
    initial = json.loads((tmp_path / "out" / "initial_scores.json").read_text())["scores"]
    for name in NAMES:
        key = f"student_text_jsd/{name}"
        gap = (logged[f"eval_{key}"] - initial[key]) / (0 - initial[key])
        assert logged[f"eval_gap_closed_{key}"] == pytest.approx(gap) and gap != 0
    assert logged["eval_gap_closed_student_text_jsd/math"] != logged["eval_gap_closed_student_text_jsd/code"]


def test_a_run_may_keep_the_best_student_by_the_gap_of_one_teacher(made):
    best = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    trainer = made(**best, metric_for_best_model="eval_gap_closed_student_text_jsd/code")
    assert trainer.args.greater_is_better is True
    with pytest.raises(ConfigurationError, match="expected a score that evaluation gives"):
        made(**best, metric_for_best_model="eval_gap_closed_rouge_l/art")


def test_a_composed_teacher_reads_and_writes_nothing(made):
    mixed = made(teacher_mix="geometric", eval_measures=["agreement"]).evaluate()
    assert mixed["eval_student_text_kl"] > 0 and not any("/" in name for name in mixed)
    with pytest.raises(ConfigurationError, match="composed of several, which write no text"):
        made(teacher_mix="geometric", eval_measures=["exposure_bias"])
