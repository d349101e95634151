"""Choosing a divergence by name, and the schedule that moves TAID's target."""

from __future__ import annotations

import math

import pytest
import torch

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.losses import DIVERGENCES, TaidSchedule, jsd, resolve_divergence


def test_resolve_gives_the_function_with_its_parameters():
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for name, function in DIVERGENCES.items():
        assert torch.equal(resolve_divergence(name)(student, teacher), function(student, teacher))
    assert torch.equal(resolve_divergence("jsd", beta=0.2)(student, teacher), jsd(student, teacher, beta=0.2))
    assert not torch.equal(resolve_divergence("jsd")(student, teacher), jsd(student, teacher, beta=0.2))


def test_resolve_suggests_the_nearest_name_and_lists_all():
    with pytest.raises(ConfigurationError, match="Did you mean 'reverse_kl'.*logit_mse"):
        resolve_divergence("revers_kl")


def test_resolve_names_the_legal_parameters_and_defaults():
    with pytest.raises(ConfigurationError, match=r"no parameter 'alpha'.*beta=0\.5"):
        resolve_divergence("jsd", alpha=0.1)
    with pytest.raises(ConfigurationError, match="defaults: none"):
        resolve_divergence("forward_kl", beta=0.5)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        *(("jsd", {"beta": beta}) for beta in (-0.1, 1.1, math.nan, "0.5", None, True, 1e-9, 1 - 1e-9)),
        *(("skew_forward_kl", {"alpha": alpha}) for alpha in (-0.1, 1, 1e-9)),
        *(("lk", {"kl_weight": weight}) for weight in (-0.1, 1.1, math.nan, "0.5")),
        ("adaptive_kl", {"mu": 1.5}),
        ("taid", {"t": -0.1}),
    ],
)
def test_resolve_refuses_values_out_of_range(name, params):
    (key,) = params
    with pytest.raises(ConfigurationError, match=f"got {key}=.*expected a number"):
        resolve_divergence(name, **params)


def test_taid_schedule_follows_its_equation():
    schedule = TaidSchedule(t_start=0.4, t_end=1.0, alpha=0.1, decay=0.9)
    assert schedule.step(2.0, progress=0.0) == 0.4  # one loss has no drop yet
    momentum = 0.1 * (2.0 - 1.5) / 2.0
    first = 0.4 + 0.1 / (1 + math.exp(-momentum)) * 0.6
    assert schedule.step(1.5, progress=0.01) == pytest.approx(first)
    momentum = 0.9 * momentum + 0.1 * (1.5 - 1.8) / 1.5
    second = first + 0.1 / (1 + math.exp(-momentum)) * (1 - first)
    assert schedule.step(1.8, progress=0.02) == pytest.approx(second)
    assert schedule.step(1.8, progress=0.9) == pytest.approx(0.4 + 0.6 * 0.9)  # the line has overtaken it


def test_taid_schedule_rises_from_start_to_end_whatever_the_losses():
    schedule = TaidSchedule(t_start=0.2, t_end=0.9)
    losses = [0.0, 1e-12, 1e6, 0.0, math.nan, math.inf, 3.0, 1.0]
    values = [schedule.step(loss, progress=i / (len(losses) - 1)) for i, loss in enumerate(losses)]
    assert values == sorted(values)
    assert values[0] == 0.2 and values[-1] == 0.9


def test_taid_schedule_without_adaptation_is_linear():
    schedule = TaidSchedule(t_start=0.2, t_end=0.6, alpha=0.0)
    assert [schedule.step(1 / (i + 1), i / 4) for i in range(5)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])


def test_taid_schedule_resumes():
    whole, first_half = TaidSchedule(alpha=0.1), TaidSchedule(alpha=0.1)
    losses = [3.0, 2.0, 2.5, 1.0, 0.5]
    for i, loss in enumerate(losses[:3]):
        whole.step(loss, i / 10)
        first_half.step(loss, i / 10)
    resumed = TaidSchedule(alpha=0.1)
    resumed.load_state_dict(first_half.state_dict())
    for i, loss in enumerate(losses[3:], start=3):
        assert resumed.step(loss, i / 10) == whole.step(loss, i / 10)


@pytest.mark.parametrize("params", [{"t_start": 0.9, "t_end": 0.5}, {"t_end": 1.5}, {"alpha": -1}, {"decay": 1.0}])
def test_taid_schedule_refuses_impossible_settings(params):
    with pytest.raises(ConfigurationError):
        TaidSchedule(**params)
