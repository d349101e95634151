"""Students made anew by `model_init`: repeated runs, and the search for hyperparameters."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers import METHODS
from distill_trainers.trainers.given.arguments import made_by, takes_trial


def _losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("method", list(METHODS))
def test_each_run_begins_with_a_new_student(make_trainer, make_student, method):
    """Both runs are the run of a trainer that was given the student: nothing of the first is left in the second."""
    settings = {"method": method, "max_steps": 2}
    plain = make_trainer(**settings)
    plain.train()
    trainer = make_trainer(**settings, model_init=lambda: make_student())
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append(_losses(trainer))
    assert runs[0] == runs[1] == _losses(plain)


def test_a_new_student_gets_its_adapter_and_may_be_a_name(make_trainer, saved):
    made = []

    def init():
        made.append(saved.student)
        return saved.student

    trainer = make_trainer(model_init=init, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), max_steps=1)
    first = trainer.model
    trainer.train()
    assert trainer.model is not first and trainer.model.peft_config and len(made) == 2
    assert trainer.teacher.name != saved.student


def test_settings_of_the_method_are_read_again_for_each_student(make_trainer, make_student):
    """The right value: that of a trainer made with the setting."""
    expected = make_trainer(kd_temperature=3.0, beta=0.9, lmbda=1.0, max_steps=1)
    expected.train()
    trainer = make_trainer(model_init=lambda: make_student(), lmbda=0.5, max_steps=1)
    trainer.train()
    for name, value in {"kd_temperature": 3.0, "beta": 0.9, "lmbda": 1.0}.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert _losses(trainer) == _losses(expected)


def test_a_resumed_run_of_a_new_student_goes_on(make_trainer, make_student, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "replay_buffer_size": 8, "lmbda": 1.0}
    trainer = make_trainer(model_init=lambda: make_student(), **settings)
    trainer.train()
    whole = _losses(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert _losses(trainer) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    "init, words",
    [
        (lambda: 3, "got an object of type int as `model_init()`"),
        (lambda: torch.nn.Linear(2, 2), "got an object of type Linear as `model_init()`"),
        (lambda one, two: None, "expected a function of no argument, or of the trial"),
        (lambda *, size: None, "expected a function of no argument, or of the trial"),
        (torch.nn.Linear(2, 2), "got an object of type Linear as `model_init`"),
        (LlamaForCausalLM, "got the class LlamaForCausalLM as `model_init`"),
        (dict, "got the class dict as `model_init`"),
    ],
)
def test_what_is_no_student_is_refused(make_trainer, init, words):
    with pytest.raises(ConfigurationError, match=words.replace("(", r"\(").replace(")", r"\)")):
        make_trainer(model_init=init)


@pytest.mark.parametrize(
    "init, right",
    [
        (lambda: "none", "none"),
        (lambda trial: trial, "trial"),
        (lambda run=3: run, "trial"),
        (lambda *given: given, ("trial",)),
        (lambda run, seed=1: (run, seed), ("trial", 1)),
        (lambda trial=None, seed=1: (trial, seed), ("trial", 1)),
        (lambda **settings: settings, {}),
        (lambda *, seed=1: seed, 1),
        (lambda seed=1, width=2: (seed, width), (1, 2)),
        (functools.partial(lambda width, seed: (width, seed), 3, seed=2), (3, 2)),
    ],
)
def test_a_function_gets_the_trial_where_it_takes_one(init, right):
    """Never in the place of a setting that has a default: the trial would be a seed, and nothing would be said."""
    assert takes_trial(init) is not None
    assert made_by(init, "trial") == right


def test_a_partial_function_makes_students(make_trainer, make_student):
    settings = {"max_steps": 1, "eval_dataset": addition_dataset(4)}
    trainer = make_trainer(model_init=functools.partial(make_student, seed=5), **settings)
    assert trainer.evaluate()["eval_loss"] == make_trainer(make_student(seed=5), **settings).evaluate()["eval_loss"]


def test_the_same_student_twice_is_refused(make_trainer, make_student):
    student = make_student()
    trainer = make_trainer(model_init=lambda: student)
    with pytest.raises(ConfigurationError, match="the model that it had returned before"):
        trainer.train()


# ---- The search -----------------------------------------------------------------------------------------------------


def test_a_search_without_model_init_names_it(make_trainer):
    with pytest.raises(ConfigurationError, match=r"GKDTrainer\(model_init=function"):
        make_trainer().hyperparameter_search()


@pytest.mark.skipif(importlib.util.find_spec("optuna") is not None, reason="there is a backend")
def test_a_search_without_a_backend_names_those_that_there_are(make_trainer, make_student):
    with pytest.raises(RuntimeError, match="optuna"):
        make_trainer(model_init=lambda: make_student(), eval_dataset=addition_dataset(4)).hyperparameter_search()


def _search(trainer, space, **kwargs):
    pytest.importorskip("optuna")
    return trainer.hyperparameter_search(space, backend="optuna", compute_objective=lambda m: m["eval_loss"], **kwargs)


@pytest.mark.slow
def test_a_search_finds_the_best_of_its_trials(make_trainer, make_student, tmp_path):
    """Each trial's objective is what a trainer made with its settings evaluates to."""
    import optuna

    rows, values = addition_dataset(8, seed=5), [1e-4, 3e-2]
    settings = {"eval_dataset": rows, "max_steps": 3, "lmbda": 0.5}
    expected = {}
    for rate in values:
        plain = make_trainer(**settings, learning_rate=rate, kd_temperature=2.0)
        plain.train()
        expected[rate] = plain.evaluate()["eval_loss"]
    trainer = make_trainer(**settings, model_init=lambda trial: make_student())
    sampler = optuna.samplers.GridSampler({"learning_rate": values, "kd_temperature": [2.0]})

    def space(trial):
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-1),
            "kd_temperature": trial.suggest_float("kd_temperature", 0.5, 4.0),
        }

    best = _search(trainer, space, n_trials=2, sampler=sampler)
    assert best.hyperparameters["learning_rate"] == min(expected, key=expected.get)
    assert best.objective == pytest.approx(min(expected.values()), rel=1e-6)


@pytest.mark.parametrize(
    "space, words",
    [
        ({"learning_rte": 1.0}, "Did you mean learning_rate"),
        ({"max_length": 12}, "`max_length` acts while the trainer is made"),
        ({"divergence": "forward_kl"}, "`divergence` acts while the trainer is made"),
        ({"lmbda": 0.0}, "asks something else of rows or teacher"),
        ({"kd_temperature": -1.0}, "kd_temperature: -1.0"),
        (None, "`hp_space` returned an object of type NoneType"),
    ],
)
def test_what_no_trial_can_set_is_refused(make_trainer, make_student, space, words):
    pytest.importorskip("optuna")
    trainer = make_trainer(model_init=lambda: make_student(), eval_dataset=addition_dataset(4), max_steps=1, lmbda=0.5)
    with pytest.raises(ConfigurationError, match=words):
        _search(trainer, lambda trial: space and dict(space), n_trials=1)


def test_a_search_goes_by_the_loss_where_nothing_else_is_said(make_trainer, make_student):
    """Not by the sum of all metrics, as transformers would: it adds perplexity, agreement and the count of tokens."""
    optuna = pytest.importorskip("optuna")
    settings = {"eval_dataset": addition_dataset(8, seed=5), "max_steps": 1}
    plain = make_trainer(**settings, learning_rate=1e-3)
    plain.train()
    trainer = make_trainer(**settings, model_init=lambda: make_student())
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        n_trials=1,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"learning_rate": [1e-3]}),
    )
    assert best.objective == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    with pytest.raises(ConfigurationError, match="has put its students away.*`train`"):
        trainer.evaluate()


@pytest.mark.parametrize(
    "settings, search, words",
    [
        ({}, {}, "without `eval_dataset`"),
        ({"eval_dataset": {"a": addition_dataset(4)}}, {}, "several evaluation sets.*compute_objective="),
        ({"eval_dataset": addition_dataset(4), "compute_metrics": dict}, {}, "metrics of your own.*compute_objective="),
        ({"eval_dataset": addition_dataset(4)}, {"direction": "maximize"}, "direction='maximize'.*`eval_loss`"),
        ({"eval_dataset": addition_dataset(4)}, {"hp_space": {"seed": [1]}}, "type dict as `hp_space`"),
    ],
)
def test_a_search_that_does_not_know_its_aim_is_refused_before_its_first_trial(
    make_trainer, make_student, settings, search, words
):
    trainer = make_trainer(model_init=lambda: make_student(), **settings)
    with pytest.raises(ConfigurationError, match=words):
        trainer.hyperparameter_search(**{"hp_space": lambda trial: {}, "n_trials": 1, **search})
