"""The first screen: what came of a run, in a sentence that claims no more than is known; each curve once; phones."""

import dataclasses
import re
from collections import Counter
from html import unescape
from importlib.resources import files
from math import inf, nan

import pytest

from distill_trainers.evaluation.results import GapClosed
from distill_trainers.reporting.page import report_page
from distill_trainers.reporting.result import outcomes_of, result
from distill_trainers.reporting.runs import Run, read_runs


def _text(html):
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).replace("\u00a0", " ").split())


def _told(results, **run):
    return _text(result([Run("run", evaluation=results, **run)]))


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        (GapClosed(0.84, 0.82, 0.86, True), "84 % [82, 86] of the gap to the teacher is closed."),
        (GapClosed(0.1, -0.1, 0.3, True), "No change that can be told from noise (10 % [-10, 30] of the gap"),
        (GapClosed(-0.2, -0.3, -0.1, True), "The student moved away from its teacher (-20 % [-30, -10] of the gap)."),
        (GapClosed(1.2, 1.1, 1.3, True), "The student passed its teacher (120 % [110, 130] of the gap)."),
        (GapClosed(1.2, 0.9, 1.3, True), "120 % [90, 130] of the gap to the teacher is closed."),
    ],
)
def test_the_verdict_is_no_more_than_is_known(made_up, gap, verdict):
    results = made_up()
    results.model("student").scores["kl"].gap_closed = gap
    assert f"Result {verdict}" in _told(results).replace("Result Result", "Result")


def test_a_gap_that_is_noise_is_not_told_first(made_up):
    results = made_up()
    scores = results.model("student").scores
    scores["kl"].gap_closed = dataclasses.replace(scores["kl"].gap_closed, decided=False)
    told = _told(results)
    assert "of the gap to the teacher is closed. Accuracy, greedy answers went from 8.0 % to" in told
    for score in scores.values():
        score.gap_closed = dataclasses.replace(score.gap_closed, decided=False)
    assert "there was no gap to close" in _told(results)


def test_what_the_run_is_for_comes_first(made_up):
    def first(record):
        return outcomes_of(Run("r", evaluation=made_up(), record=record))[0].lines[0].name

    assert first({}) == first({"recipe": "damaged"}) == "kl"
    assert first({"method": "Rationale"}) == first({"recipe": {"reward_funcs": ["exact"]}}) == "accuracy"
    assert first({"recipe": {"metric_for_best_model": "eval_acceptance", "reward_funcs": ["exact"]}}) == "acceptance"


def test_size_and_speed_beside_the_teacher(made_up):
    told = _told(made_up())
    assert "Parameters 494 M 494 M 7.242 B 6.82 % of the teacher's" in told
    assert "Decoding (tokens/s) 1,480 1,480 212.0 6.98 x the teacher's" in told


def test_a_log_of_rewards_of_several_teachers_and_of_several_sets():
    def log(**end):
        return [{"step": 0, **dict.fromkeys(end, 0.25)}, {"step": 9, **end}]

    rewards = {"recipe": {"reward_funcs": ["exact"]}}
    rewarded = Run("r", history=log(**{"eval_kl": 0.5, "eval_pass@1": 0.75}), record=rewards)
    assert "Result Pass@1 went from 25.0 % to 75.0 % (higher is better)." in _text(result([rewarded]))
    experts = Run("r", history=log(**{"eval_kl/math": 0.2, "eval_kl/code": 0.1}))
    told = _text(result([experts]))
    assert "Forward KL to the teacher, math" in told and "Forward KL to the teacher, code" in told
    sets = {f"eval_{name}_{score}": 0.1 for name in ("chat", "code") for score in ("loss", "tokens", "kl")}
    told = _text(result([Run("r", history=log(**sets, eval_sequence_kl=0.1))]))
    assert all(f"Forward KL to the teacher, {name}" in told for name in ("chat", "code")) and "sequence" not in told


@pytest.mark.parametrize(
    ("score", "told"),
    [
        ("loss", "Loss went from 2.500 to 1.500 (lower is better)."),
        ("divergence", "Divergence went from 2.500 to 1.500 (lower is better)."),
        ("my_score", "My score went from 2.500 to 1.500."),
    ],
)
def test_a_score_that_is_no_measure_is_no_share(score, told):
    history = [{"step": 0, f"eval_{score}": 2.5}, {"step": 9, f"eval_{score}": 1.5}]
    record = {"recipe": {"metric_for_best_model": f"eval_{score}"}}
    assert told in _text(result([Run("r", history=history, record=record)]))


def test_runs_with_several_sets_are_compared_on_the_same_one():
    def run(name, *sets):
        end = {f"eval_{each}_{score}": 0.1 for each in sets for score in ("loss", "tokens", "kl")}
        return Run(name, history=[{"step": 0, **dict.fromkeys(end, 0.5)}, {"step": 9, **end}])

    told = _text(result([run("a", "chat", "code"), run("b", "code", "chat"), run("c", "code")]))
    assert "Forward KL to the teacher, code (" in told and "teacher, chat" not in told
    told = _text(result([run("a", "chat"), run("b", "code")]))
    assert "No two students have a score of the same kind; a has Forward KL to the teacher, chat." in told


@pytest.mark.parametrize(
    ("history", "told"),
    [
        ([{"step": 0, "eval_kl": 2.5}, {"step": 9, "loss": 1.0}], "is 2.500 nats/token before training"),
        (
            [{"step": 0, "eval_kl": 2.5}, {"step": 5, "eval_kl": 0.5}, {"step": 9, "eval_kl": nan}],
            "went from 2.500 to nan",
        ),
        ([{"step": 0, "eval_kl": 2.5}, {"step": 9, "eval_kl": inf}], "went from 2.500 to inf"),
        (
            [{"step": 0, "eval_kl": 2.5}, {"step": 5, "eval_kl": 0.5}, {"step": 9, "eval_loss": nan}],
            "from 2.500 to nan",
        ),
        (
            [{"step": 0, "eval_kl": 1e-9}, {"step": 9, "eval_kl": 0.9}],
            "Result Forward KL to the teacher went from 0.000 to 0.900",
        ),
    ],
    ids=["only before", "not a number", "infinite", "lost", "the teacher itself"],
)
def test_a_log_is_not_said_to_have_ended_better_than_it_did(history, told):
    said = _text(result([Run("r", history=history)]))
    assert told in said and "of the gap" not in said.split("Measured on")[0]


def test_of_a_run_that_kept_its_best_student_that_one_is_told():
    history = [{"step": step, "eval_kl": kl} for step, kl in ((0, 2.5), (5, 0.5), (9, 3.0))]
    kept = {"recipe": {"load_best_model_at_end": True}}

    def told(*end, record=kept):
        return _text(result([Run("r", history=[*history, *end], record=record, best_step=5)]))

    done, scored = {"step": 9, "train_runtime": 1.0}, {"step": 9, "eval_kl": 0.51}
    assert "to 0.500 nats" in told(done) and "at step 5, the student that was kept" in told(done)
    assert "to 0.510 nats" in told(done, scored), "scored once more, after it was taken back"
    assert "to 3.000 nats" in told() and "to 3.000 nats" in told(done, record={})


def test_a_student_that_was_ahead_had_no_gap_to_close(made_up):
    def log(before, after):
        ends = {0: before, 9: after}
        return [{"step": s, "eval_accuracy": value, "eval_teacher_accuracy": 0.5} for s, value in ends.items()]

    ahead = "Before training the student scored better than its teacher: there was no gap to close."
    for after in (0.55, 0.9, 0.3):
        told = _text(result([Run("r", history=log(0.6, after))]))
        assert f"Result {ahead} Accuracy" in told and "of the gap" not in told
    assert "About 50 % of the gap" in _text(result([Run("r", history=log(0.4, 0.45))]))
    results = made_up()
    of_teacher = next(model for model in results.models if model.role == "teacher")
    for name, score in of_teacher.scores.items():
        score.value = -1.0 if results.measures[name].higher_is_better else 1e9
    assert ahead in _told(results)
    for score in results.model("student").scores.values():
        score.gap_closed = GapClosed(0.5, 0.1, 0.9, False)
    assert "by no more than noise: there was no gap to close" in _told(results)
    both = [Run("a", history=log(0.6, 0.3)), Run("b", history=log(0.6, 0.55))]
    assert "closed the most" not in _text(result(both))


def test_what_was_not_measured_is_said_with_how_to_have_it(made_up):
    late = Run("r", history=[{"step": 5, "eval_kl": 0.5}])
    assert "How r scored before training is not in its log; with eval_on_start: true it is." in _text(result([late]))
    both = _text(result([late, Run("evaluated", evaluation=made_up())]))
    assert "There is no evaluation of r yet" in both and "2 students by Forward KL to the teacher" in both
    assert "Nothing was measured" not in both


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_no_curve_is_drawn_twice(scale):
    """A forward KL is also the loss and its divergence; on another scale it is another curve."""
    losses = [3.0, 2.0, 1.0]
    scaled = ("divergence", "eval_divergence", "eval_kl")
    history = [{"step": i, "loss": x, "eval_loss": x, **dict.fromkeys(scaled, scale * x)} for i, x in enumerate(losses)]
    page = report_page([Run("r", history=history)])
    lines = Counter(re.findall(r'<polyline points="([^"]*)"', page))
    titles = re.findall(r"<figcaption><b>([^<]*)</b>", page)
    if scale == 1:
        assert titles == ["Loss", "Forward KL to the teacher"]
        assert "the same to the eye: divergence" in _text(page) and len(lines) <= 2
    else:
        assert titles == ["Loss", "Divergence", "Forward KL to the teacher", "Loss"]


def test_it_is_whole_on_a_phone(made_up, run_folder):
    """Without a browser: tables scroll in their own boxes, drawings scale, and the window is as wide as the screen."""
    page = report_page(read_runs([run_folder("a", made_up(students=3)), run_folder("b")]))
    assert page.count("<table") == len(re.findall(r'<div class="scroll"[^>]*><table', page)) > 0
    drawings = re.findall(r"<svg[^>]*>", page)
    assert drawings and not [drawing for drawing in drawings if re.search(r'\b(width|height)="', drawing)]
    assert 'content="width=device-width, initial-scale=1"' in page
    css = files("distill_trainers.reporting").joinpath("assets", "report.css").read_text()
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", css) and re.search(r"figure > svg \{[^}]*width: 100%", css)
    assert max(int(width) for width in re.findall(r"(?<![-\w])width: (\d+)px", css)) <= 320
