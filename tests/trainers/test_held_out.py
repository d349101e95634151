"""Measures of a run on held-out prompts: right, at each evaluation, without disturbing it, for every method."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import EarlyStoppingCallback

from distill_trainers import GKDConfig
from distill_trainers.evaluation import EvaluationSettings, evaluate_models
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.hub import published_files
from distill_trainers.toy import addition_dataset, addition_rows
from distill_trainers.trainers import METHODS
from distill_trainers.trainers.lifecycle.held_out import HeldOutMeasures
from distill_trainers.trainers.lifecycle.side_by_side import SideBySide, log_side_by_side

ALL = ["agreement", "rouge_l", "diversity", "exposure_bias", "calibration"]
SETTINGS = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_steps": 4,
    "eval_measures_rows": 5,
    "eval_measures_seeds": 2,
}


@pytest.fixture
def make(make_trainer):
    def trainer(measures=ALL, **settings):
        settings = {"eval_dataset": addition_dataset(8, seed=5), "eval_measures": measures, **SETTINGS, **settings}
        return make_trainer(**settings)

    return trainer


def evaluations(trainer):
    return {row["step"]: row for row in trainer.state.log_history if "eval_loss" in row}


def test_scores_are_those_of_an_evaluation_of_the_same_models(make, tokenizer):
    trainer = make(seed=3)
    student = copy.deepcopy(trainer.model)
    metrics = trainer.evaluate()
    settings = EvaluationSettings(
        metrics=ALL, max_length=24, max_new_tokens=4, seeds=[3, 4], batch_size=8, bootstrap_samples=10
    )
    how = {"teacher": trainer.teacher.model, "tokenizer": tokenizer, "use_cpu": True, "progress": False}
    results = evaluate_models({"mine": student}, addition_rows(5, seed=5), settings=settings, **how)
    scores = results.model("mine").scores
    assert len(scores) >= 14
    of_the_whole = {"kl", "top1_agreement", "acceptance", "bits_per_byte", "next_byte_agreement"}
    for name, score in scores.items():
        if name not in of_the_whole:
            assert metrics[f"eval_{name}"] == pytest.approx(score.value, rel=1e-4), name
    teacher = results.model("teacher").scores
    for name in ("rouge_l", "distinct_4", "self_bleu", "completion_tokens"):
        assert metrics[f"eval_teacher_{name}"] == pytest.approx(teacher[name].value, rel=1e-5)
    assert "eval_teacher_kl" not in metrics and metrics["eval_tokens"] > 5 * 2


def test_a_run_logs_them_at_each_evaluation_with_the_gap_that_was_closed(make, tmp_path):
    trainer = make(["agreement", "rouge_l"], lmbda=0.0)
    trainer.train()
    logged = evaluations(trainer)
    assert list(logged) == [2, 4]
    initial = json.loads((tmp_path / "out" / "initial_scores.json").read_text())["scores"]
    for row in logged.values():
        gap = (row["eval_student_text_jsd"] - initial["student_text_jsd"]) / (0 - initial["student_text_jsd"])
        assert row["eval_gap_closed_student_text_jsd"] == pytest.approx(gap)
        assert {"eval_reverse_kl", "eval_rouge_l", "eval_teacher_rouge_l"} <= row.keys()
    assert logged[2]["eval_student_text_jsd"] != logged[4]["eval_student_text_jsd"]


def test_they_do_not_disturb_training(make, make_trainer, by_step):
    runs = []
    for settings in ({"measures": ALL}, {"measures": None}):
        trainer = make(lmbda=0.5, **settings)
        trainer.train()
        runs.append(by_step(trainer))
    assert runs[0] == runs[1]


def test_the_teacher_writes_once_over_all_runs_and_evaluations(make, monkeypatch, tmp_path):
    from distill_trainers.rollouts import engines

    written, inner = [], engines.decode_completions

    def decode(model, *args, **kwargs):
        written.append(model)
        return inner(model, *args, **kwargs)

    monkeypatch.setattr(engines, "decode_completions", decode)
    for times in (2, 0):  # one batch of prompts for each of two seeds
        trainer = make(["rouge_l"], completions_dir=str(tmp_path / "kept"), lmbda=0.0)
        written.clear()
        trainer.train()
        assert sum(model is trainer.teacher.model for model in written) == times
        assert sum(model is not trainer.teacher.model for model in written) == 3 * 2


def test_the_best_model_and_early_stopping_by_any_of_them(make, tmp_path):
    best = {
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_ece",
    }
    trainer = make(
        ["calibration"], **best, learning_rate=0.0, max_steps=12, callbacks=[EarlyStoppingCallback(2)], lmbda=0.0
    )
    assert trainer.args.greater_is_better is False
    trainer.train()
    assert trainer.state.global_step == 6, "two evaluations without a better one after the first"
    assert trainer.state.best_metric == evaluations(trainer)[2]["eval_ece"]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_them(make, rows_for, method):
    rows = rows_for(method)(6, 5)
    measures = ["diversity", "calibration"] if method == "rationale" else ["agreement", "exposure_bias", "calibration"]
    trainer = make(measures, method=method, eval_dataset=rows, max_steps=2)
    trainer.train()
    (row,) = evaluations(trainer).values()
    expected = "eval_distinct_4" if method == "rationale" else "eval_student_text_reverse_kl"
    assert row[expected] >= 0 and 0 <= row["eval_ece"] <= 1


def test_a_resumed_run_counts_from_the_same_start(make, die_at, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "lmbda": 0.0}
    whole = make(["agreement"], **settings, output_dir=str(tmp_path / "whole"))
    whole.train()
    killed = make(["agreement"], **settings, callbacks=[die_at(3)])
    with pytest.raises(die_at.error):
        killed.train()
    resumed = make(["agreement"], **settings)
    resumed.train(resume_from_checkpoint=True)
    name = "eval_gap_closed_student_text_jsd"
    assert evaluations(resumed)[4][name] == pytest.approx(evaluations(whole)[4][name])


@pytest.fixture
def student_writes(monkeypatch):
    """`student_writes(lengths)`: at each evaluation the student writes so many tokens, the teacher 3 or 4."""
    from distill_trainers.trainers.lifecycle import held_out

    def script(lengths):
        turns = iter(lengths)

        def complete(prompts, generating, accelerator, settings, store=None, **kwargs):
            length = next(turns) if store is None else None
            sizes = (3 + n % 2 for n in range(len(prompts))) if length is None else itertools.repeat(length)
            return {key: [4] * size for key, size in zip(prompts, sizes, strict=False)}

        monkeypatch.setattr(held_out, "complete_prompts", complete)

    return script


def excess(trainer):
    return [row.get("eval_exposure_error") for row in evaluations(trainer).values()]


@pytest.mark.parametrize("resumed", [False, True])
def test_the_excess_error_of_all_steps_is_at_one_length(make, monkeypatch, student_writes, die_at, tmp_path, resumed):
    """That of the first evaluation, 2: it was chosen anew at each, and in a resumed run."""
    from distill_trainers.evaluation import scores

    seen, inner = [], scores.exposure_sums
    monkeypatch.setattr(
        scores, "exposure_sums", lambda own, given, length: seen.append(length) or inner(own, given, length)
    )
    settings = {"eval_measures_seeds": 1, "lmbda": 0.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    student_writes([2, 4, 3, 4, 4])
    if resumed:
        with pytest.raises(die_at.error):
            make(["exposure_bias"], **settings, callbacks=[die_at(3)]).train()
    trainer = make(["exposure_bias"], **settings)
    trainer.train(resume_from_checkpoint=resumed or None)
    assert [length for length in seen if length > 1] == [2] * 4  # a teacher's own, which is 0, is taken at 1
    assert None not in excess(trainer)


def test_an_excess_error_that_no_text_reaches_is_left_out_and_said(make, student_writes, caplog):
    """A student that has fallen silent must not look good: positions that it never reaches add nothing."""
    student_writes([4, 2, 4])
    trainer = make(["exposure_bias"], eval_measures_seeds=1, lmbda=0.0)
    trainer.train()
    silent, speaking = excess(trainer)
    assert silent is None and speaking is not None
    assert "exposure_error is left out of step 2: it is taken over 3 tokens" in caplog.text


def test_several_evaluation_sets_share_the_measures_of_the_first(make):
    sets = {"near": addition_dataset(6, seed=5), "far": addition_dataset(6, seed=6)}
    trainer = make(["rouge_l"], eval_dataset=sets, max_steps=2, lmbda=0.0)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_rouge_l" in row]
    assert len(rows) == 2 and rows[0]["eval_rouge_l"] == rows[1]["eval_rouge_l"]
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, HeldOutMeasures)]
    assert [each.references for each in callback.examples.examples] == [
        [row["completion"]] for row in addition_rows(5, 5)
    ]


def test_prompts_alone_are_read_on_the_teachers_text(make):
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in addition_rows(6, 5)])
    metrics = make(["agreement", "calibration"], eval_dataset=prompts, lmbda=1.0).evaluate()
    assert metrics["eval_reverse_kl"] > 0 and metrics["eval_ece"] > 0


# ---- Side by side ---------------------------------------------------------------------------------------------------


def test_samples_of_both_models_are_kept(make, tmp_path):
    trainer = make(["rouge_l"], lmbda=0.0, eval_measures_shown=2)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 2, 2, 4, 4]
    first = addition_rows(1, 5)[0]
    assert (rows[0]["prompt"], rows[0]["reference"]) == (first["prompt"], first["completion"])
    assert rows[0]["teacher"] == rows[2]["teacher"] == rows[4]["teacher"]
    assert len({row["student"] for row in rows[::2]}) > 1
    assert "samples.jsonl" not in published_files(trainer.args.output_dir)


class Tracker:
    """What wandb and trackio have of a table."""

    run = object()

    def __init__(self):
        self.logged = []

    def Table(self, **content):
        return content

    def log(self, values):
        self.logged.append(values)


def test_samples_go_to_the_trackers_that_were_asked_for(monkeypatch, tmp_path):
    import importlib.util

    trackers = {"wandb": Tracker(), "trackio": Tracker()}
    for name, tracker in trackers.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: True if name in trackers else found(name, *a))
    texts = []
    board = SimpleNamespace(tb_writer=SimpleNamespace(add_text=lambda *args: texts.append(args)))

    def log(report_to, step):
        args = SimpleNamespace(output_dir=str(tmp_path), report_to=report_to)
        log_side_by_side(args, [board], step, [SideBySide("2+2=", "4", "a | b", "4")])

    log(["tensorboard", "wandb", "trackio"], 7)
    (name, text, step) = texts[0]
    assert (name, step) == ("eval_samples", 7) and "| 7 | 2+2= | 4 | a / b | 4 |" in text
    (table,) = [values["eval_samples"] for values in trackers["wandb"].logged]
    assert table["data"] == [[7, "2+2=", "4", "a | b", "4"]]
    (frame,) = [values["eval_samples"]["dataframe"] for values in trackers["trackio"].logged]
    assert frame.loc[0, "student"] == "a | b"
    log([], 8)
    assert len(trackers["wandb"].logged) == len(trackers["trackio"].logged) == 1
    monkeypatch.setattr(trackers["wandb"], "log", lambda values: 1 / 0)
    log(["wandb"], 9)  # a tracker's trouble ends no run


# ---- What cannot work -----------------------------------------------------------------------------------------------


def test_unknown_measures_are_refused(tmp_path):
    for changes, expected in (
        ({"eval_measures": ["rouge"]}, "rouge_l"),
        ({"eval_measures": ["speed"]}, "eval_measures"),
        ({"eval_measures_rows": 0}, "eval_measures_rows"),
        ({"eval_measures_seeds": 0}, "eval_measures_seeds"),
    ):
        with pytest.raises(ConfigurationError, match=expected):
            GKDConfig(str(tmp_path), **changes)


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"eval_dataset": None, "eval_strategy": "no"}, DatasetError, "no `eval_dataset`"),
        (
            {"measures": None, "metric_for_best_model": "eval_rouge_l"},
            ConfigurationError,
            r"eval_measures: \[rouge_l\]",
        ),
        ({"measures": ["consistency"], "eval_measures_seeds": 1}, ConfigurationError, "at least 2 seeds"),
        ({"teacher_cache": "cache", "lmbda": 0.0}, ConfigurationError, "teacher_cache"),
        ({"max_new_tokens": 24, "lmbda": 0.0}, ConfigurationError, "no room"),
    ],
)
def test_what_cannot_be_measured_is_refused(make, tmp_path, changes, error, expected):
    if "teacher_cache" in changes:
        changes = {**changes, "teacher_cache": str(tmp_path / "cache")}
    with pytest.raises(error, match=expected):
        make(**changes)


def test_answers_that_nobody_can_find_are_refused(make):
    with pytest.raises(DatasetError, match="no questions for accuracy"):
        make(["accuracy"]).evaluate()


def test_a_run_without_a_teacher_cannot_agree_with_it(make, rows_for):
    with pytest.raises(ConfigurationError, match="agreement"):
        make(["agreement"], method="rationale", teacher=None, eval_dataset=rows_for("rationale")(6, 5))


def test_a_score_that_is_not_defined_is_left_out(make):
    metrics = make(["diversity"], eval_measures_seeds=1).evaluate()
    assert "eval_self_bleu" not in metrics and math.isfinite(metrics["eval_completion_tokens"])
