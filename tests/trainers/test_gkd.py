"""GKD: the loss and its settings, the λ draw."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset

from distill_trainers import GKDConfig
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.losses import DIVERGENCES
from distill_trainers.rollouts import draws_on_policy
from distill_trainers.toy import addition_dataset

# ---- The loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_no_loss(make_trainer, make_teacher, batch_of, divergence):
    teacher = make_teacher()
    trainer = make_trainer(copy.deepcopy(teacher), teacher, lmbda=0.0, divergence=divergence)
    batch = batch_of(trainer)
    assert abs(trainer.compute_loss(trainer.model, batch).item()) < 1e-6
    # and another student has one
    other = make_trainer(teacher=teacher, lmbda=0.0, divergence=divergence)
    assert other.compute_loss(other.model, batch).item() > 1e-3


def _jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


REFERENCES = {
    "forward_kl": lambda p, q: (p * (p / q).log()).sum(-1),
    "reverse_kl": lambda p, q: (q * (q / p).log()).sum(-1),
    "jsd": lambda p, q: _jsd(p, q, 0.3),
    "skew_forward_kl": lambda p, q: (p * (p / (0.2 * p + 0.8 * q)).log()).sum(-1),
    "skew_reverse_kl": lambda p, q: (q * (q / (0.8 * p + 0.2 * q)).log()).sum(-1),
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
}
PARAMETERS = {"jsd": {"beta": 0.3}, "skew_forward_kl": {"alpha": 0.2}, "skew_reverse_kl": {"alpha": 0.2}}


@pytest.mark.parametrize("tau_squared", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("divergence", REFERENCES)
def test_loss_at_a_temperature(make_trainer, batch_of, dense, divergence, tau, tau_squared):
    """Both models at τ; τ² only where asked for. The sampling temperature plays no part."""
    settings = {"kd_temperature": tau, "tau_squared": tau_squared, "temperature": 0.3, **PARAMETERS.get(divergence, {})}
    trainer = make_trainer(lmbda=0.0, divergence=divergence, **settings)
    found = dense(trainer.model, trainer.teacher.model, [trainer.train_dataset[i] for i in range(6)], temperature=tau)
    expected = REFERENCES[divergence](found.p.exp(), found.q.exp()).mean().item() * (tau**2 if tau_squared else 1)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(6)))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_lm_loss_is_added_at_temperature_1(make_trainer, batch_of, dense, by_step):
    settings = {"lmbda": 0.0, "divergence": "forward_kl", "kd_temperature": 2.0, "lm_loss_weight": 0.25}
    trainer = make_trainer(max_steps=1, per_device_train_batch_size=6, train=addition_dataset(6), **settings)
    rows = list(trainer.train_dataset)
    soft = dense(trainer.model, trainer.teacher.model, rows, temperature=2.0)
    hard = dense(trainer.model, trainer.teacher.model, rows)
    kl = (soft.p.exp() * (soft.p - soft.q)).sum(-1).mean().item()
    nll = -hard.q.gather(1, hard.labels[:, None]).mean().item()
    trainer.train()
    assert by_step(trainer)[1] == pytest.approx(kl + 0.25 * nll, rel=1e-5)
    assert by_step(trainer, "divergence")[1] == pytest.approx(kl, rel=1e-5)
    assert by_step(trainer, "lm_loss")[1] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("replay", [{}, {"replay_buffer_size": 8}])
def test_lm_loss_is_logged_where_it_is_trained(make_trainer, by_step, replay):
    settings = {"lm_loss_weight": 0.25, "tau_squared": False, "max_steps": 4, "seed": 1, **replay}
    trainer = make_trainer(lmbda=0.5, eval_dataset=addition_dataset(4, seed=9), **settings)
    trainer.train()
    given = {step for step in range(1, 5) if not draws_on_policy(0.5, 1, step - 1)}  # others sample, or replay samples
    assert 0 < len(given) < 4 and by_step(trainer, "lm_loss").keys() == given
    for step, value in by_step(trainer).items():
        language = 0.25 * by_step(trainer, "lm_loss").get(step, 0.0)
        assert value == pytest.approx(by_step(trainer, "divergence")[step] + language, rel=1e-5)
    assert trainer.evaluate()["eval_lm_loss"] > 0


def test_a_log_over_steps_of_both_kinds_is_the_mean_over_those_that_train_it(make_trainer, by_step):
    settings = {"lmbda": 0.5, "lm_loss_weight": 0.25, "max_steps": 4, "seed": 1}
    steps, once = (make_trainer(**settings, logging_steps=logging) for logging in (1, 4))
    for trainer in (steps, once):
        trainer.train()
    tokens, means = by_step(steps, "trained_tokens"), by_step(steps, "lm_loss")
    expected = sum(tokens[step] * mean for step, mean in means.items()) / sum(tokens[step] for step in means)
    assert by_step(once, "lm_loss")[4] == pytest.approx(expected, rel=1e-5)


# ---- λ --------------------------------------------------------------------------------------------------------------


def test_lambda_is_a_probability_drawn_from_seed_and_step():
    draws = [draws_on_policy(0.3, 42, step) for step in range(4000)]
    assert sum(draws) / 4000 == pytest.approx(0.3, abs=0.04)  # 5 standard errors
    assert draws == [draws_on_policy(0.3, 42, step) for step in range(4000)]
    assert draws != [draws_on_policy(0.3, 43, step) for step in range(4000)]
    assert not any(draws_on_policy(0.0, 42, step) for step in range(1000))
    assert all(draws_on_policy(1.0, 42, step) for step in range(1000))
    # a larger λ only adds steps: runs of different λ can be compared
    assert all(draws_on_policy(0.6, 42, step) for step in range(4000) if draws[step])


def test_processes_agree_on_the_draw_but_not_on_the_samples(make_trainer, batch_of, monkeypatch):
    """On-policy on one process and not on another is a deadlock under ZeRO-3."""
    trainer = make_trainer(lmbda=0.5)
    batch, seen = batch_of(trainer), {}
    for rank in (0, 1):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", rank)
        torch.manual_seed(rank)  # whatever a process did before
        for step in range(12):
            trainer.state.global_step = step
            rolled = trainer.rollout([batch])
            seen[rank, step] = None if rolled[0] is batch else rolled[0]["input_ids"].tolist()
    sampled = [step for step in range(12) if seen[0, step] is not None]
    assert 0 < len(sampled) < 12
    assert sampled == [step for step in range(12) if seen[1, step] is not None]
    assert all(seen[0, step] != seen[1, step] for step in sampled)
    assert len({str(seen[0, step]) for step in sampled}) == len(sampled), "every step draws anew"


def test_rollouts_leave_the_random_state_as_it_was(make_trainer, batch_of):
    trainer = make_trainer(lmbda=1.0)
    state = torch.random.get_rng_state()
    trainer.rollout([batch_of(trainer)])
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"temperature": -0.5}, "temperature: -0.5"),
        ({"kd_temperature": 0.0}, "kd_temperature: 0.0"),
        ({"kd_temperature": -1.0}, "kd_temperature: -1.0"),
        ({"kd_temperature": math.nan}, "kd_temperature: nan"),
        ({"lmbda": 1.5}, "lmbda: 1.5"),
        ({"lmbda": -0.1}, "lmbda: -0.1"),
        ({"lmbda": math.nan}, "lmbda: nan"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"top_k": -1}, "top_k: -1"),
        ({"max_length": 1}, "max_length: 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"max_length": 32, "max_new_tokens": 32}, "max_new_tokens: 32"),
        ({"lm_loss_weight": -1.0}, "lm_loss_weight: -1.0"),
        ({"loss_chunk_mib": 0.0}, "loss_chunk_mib: 0.0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.1"),
        ({"remove_unused_columns": True}, "remove_unused_columns: True"),
        ({"seq_kd": True, "lmbda": 1.0}, "seq_kd: True"),
        ({"divergence": "kl"}, "'kl'"),
        ({"divergence": "jsd", "beta": 1.5}, "beta"),
        ({"divergence": "forward_kl", "beta": 0.5}, "beta"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path, settings, named):
    with pytest.raises(ConfigurationError) as caught:
        GKDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert named in str(caught.value)
    assert any(word in str(caught.value) for word in ("expected", "Choose", "choose", "Expected"))


def test_a_window_as_long_as_the_limit_is_fine_without_rollouts(tmp_path):
    assert GKDConfig(output_dir=str(tmp_path), use_cpu=True, lmbda=0.0, max_length=32, max_new_tokens=128)


def test_off_policy_rows_keep_the_whole_limit(make_trainer):
    """Room for new tokens is kept only where new tokens come."""
    row = [{"prompt": "12+34=" * 3, "completion": "46"}]
    trainer = make_trainer(train=Dataset.from_list(row), lmbda=0.0, max_length=21, max_new_tokens=16)
    assert trainer.train_dataset[0]["prompt_length"] == 18
    trainer = make_trainer(train=Dataset.from_list(row), lmbda=0.5, max_length=21, max_new_tokens=16)
    assert trainer.train_dataset[0]["prompt_length"] == 5
