"""Rewards beside a divergence on a toy whose texts can be counted: expectations are sums, and gradients autograd's.

3 tokens, texts of 3 tokens: 27 of them. p and q are tables of logits by prefix, in float64.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.losses.divergences import forward_kl, jsd, reverse_kl
from distill_trainers.losses.policy_gradient import returns_after, sequence_rewards
from distill_trainers.losses.rewards import (
    group_advantages,
    iw_opd_weights,
    policy_term,
    rlsd_advantages,
    spread_of_groups,
)
from distill_trainers.losses.sampler_ratio import sampler_weights

V, LENGTH, BETA = 3, 3, 0.3
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
PREFIXES = {
    prefix: k for k, prefix in enumerate(p for n in range(LENGTH) for p in itertools.product(range(V), repeat=n))
}
PLACES = torch.tensor([[PREFIXES[tuple(text[:t])] for t in range(LENGTH)] for text in TEXTS.tolist()])
MASK = torch.ones(len(TEXTS), LENGTH, dtype=torch.bool)


def table(seed):
    return torch.randn(len(PREFIXES), V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_logps(logits):
    """`[texts, LENGTH]` of the tokens, and `[texts, LENGTH, V]` of all ids."""
    logps = logits.log_softmax(-1)[PLACES]
    return logps.gather(-1, TEXTS[..., None]).squeeze(-1), logps


@pytest.fixture
def toy():
    student, teacher = table(1).requires_grad_(), table(2)
    rewards = torch.rand(len(TEXTS), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return student, teacher, rewards


def gradient(value, logits):
    return torch.autograd.grad(value, logits)[0]


def objective(student, teacher, rewards, beta):
    """E_q[R] - beta KL(q || p) of whole texts, by counting them."""
    (q, _), (p, _) = token_logps(student), token_logps(teacher)
    q, p = q.sum(1), p.sum(1)
    return (q.exp() * (rewards - beta * (q - p))).sum()


def pairs(kind, rewards, scale="none"):
    """The advantage of each text (rows) in a group with each other one (columns)."""
    count = len(TEXTS)
    first, second = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    both = torch.stack([rewards[first.flatten()], rewards[second.flatten()]], 1).flatten()
    groups = torch.arange(count * count).repeat_interleave(2)
    return group_advantages(both, groups, kind, scale)[::2].view(count, count)


def expected_gradient(student, teacher, advantages, beta, *, future=True):
    """The gradient of the terms, as a training step sums them, in expectation over texts."""
    q, q_all = token_logps(student)
    p, p_all = token_logps(teacher)
    chances = q.sum(1).exp().detach()
    behind = returns_after(sequence_rewards(q, p, MASK), MASK) if future else torch.zeros_like(q)
    policy = policy_term(q, advantages[:, None] + beta * behind)
    kl = reverse_kl(q_all.view(-1, V), p_all.view(-1, V)).view(len(TEXTS), LENGTH)
    return -gradient((chances[:, None] * (policy + beta * kl)).sum(), student)


def in_two_pairs(rewards, chances):
    """The advantage of each text with `group` and `batch`, in expectation over a step of two pairs."""
    texts = torch.cartesian_prod(*[torch.arange(len(TEXTS))] * 4)
    drawn = rewards[texts]
    advantages = (drawn[:, 0] - drawn[:, 1]) / 2 / (drawn.std(1) + 1e-4)
    return torch.zeros_like(rewards).index_add(0, texts[:, 0], advantages * chances[texts[:, 1:]].prod(1))


# ---- The gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["leave_one_out", "none"])
def test_unbiased_advantages_give_the_gradient_of_the_objective(toy, kind):
    student, teacher, rewards = toy
    chances = token_logps(student)[0].sum(1).exp().detach()
    advantages = (
        pairs(kind, rewards) @ chances if kind != "none" else group_advantages(rewards, torch.arange(len(TEXTS)), kind)
    )
    exact = gradient(objective(student, teacher, rewards, BETA), student)
    assert (expected_gradient(student, teacher, advantages, BETA) - exact).abs().max() < 1e-9
    exact = gradient(objective(student, teacher, rewards, 0.0), student)  # REINFORCE
    assert (expected_gradient(student, teacher, advantages, 0.0) - exact).abs().max() < 1e-9


def test_a_mean_with_the_sample_in_it_halves_the_gradient_of_pairs(toy):
    student, teacher, rewards = toy
    chances = token_logps(student)[0].sum(1).exp().detach()
    exact = gradient(objective(student, teacher, rewards, 0.0), student)
    halved = expected_gradient(student, teacher, pairs("group", rewards) @ chances, 0.0)
    assert (halved - 0.5 * exact).abs().max() < 1e-9
    left_out = group_advantages(rewards[:8], torch.arange(8) // 4, "leave_one_out")
    assert torch.allclose(group_advantages(rewards[:8], torch.arange(8) // 4, "group"), left_out * (1 - 1 / 4))


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_division_by_the_deviation_is_biased(toy, scale):
    """No factor makes it the gradient of the expected reward: rare rewards count for more."""
    student, teacher, rewards = toy
    groups = torch.arange(8) // 4
    all_of_them = group_advantages(rewards[:8], groups, "group", scale)
    plain = group_advantages(rewards[:8], groups, "group")
    by = spread_of_groups(rewards[:8], groups)[groups] if scale == "group" else rewards[:8].std()
    assert torch.allclose(all_of_them, plain / (by + 1e-4), rtol=1e-12)


@pytest.mark.parametrize(("scale", "along", "elsewhere"), [("group", 1.71, 0.18), ("batch", 1.96, 0.15)])
def test_by_how_much_division_is_biased(toy, scale, along, elsewhere):
    """How long its gradient is along the right one, and which share of it points elsewhere; docs/rewards.md says so."""
    student, teacher, rewards = toy
    chances = token_logps(student)[0].sum(1).exp().detach()

    def found(rewards):
        expected = pairs("group", rewards, "group") @ chances if scale == "group" else in_two_pairs(rewards, chances)
        scaled = expected_gradient(student, teacher, expected, 0.0).flatten()
        exact = gradient(objective(student, teacher, rewards, 0.0), student).flatten()
        factor = (scaled @ exact) / (exact @ exact)
        return factor.item(), ((scaled - factor * exact).norm() / scaled.norm()).item()

    assert found(rewards) == pytest.approx((along, elsewhere), abs=0.005)
    assert found((rewards > 0.5).double())[1] < 1e-9, "two rewards and one prompt: a multiple of the right one"


def test_what_gkd_leaves_out_is_the_future(toy):
    """With the text taken as given, the gradient of KL is that of single tokens alone, which differs."""
    student, teacher, rewards = toy
    advantages = group_advantages(rewards, torch.arange(len(TEXTS)), "none")
    exact = gradient(objective(student, teacher, rewards, BETA), student)
    plain = expected_gradient(student, teacher, advantages, BETA, future=False)
    q, p = token_logps(student)[0], token_logps(teacher)[0]
    chances = q.sum(1).exp().detach()
    behind = policy_term(q, BETA * returns_after(sequence_rewards(q, p, MASK), MASK))
    left_out = -gradient((chances[:, None] * behind).sum(), student)
    assert left_out.abs().max() > 0.01
    assert (plain + left_out - exact).abs().max() < 1e-9


def test_constant_rewards_leave_the_divergence_alone(toy):
    student, teacher, _ = toy
    rewards = torch.full((len(TEXTS),), 0.1, dtype=torch.float64) + 0.2
    for kind in ("leave_one_out", "group"):
        for scale in ("none", "group", "batch"):
            assert not group_advantages(rewards, torch.arange(27) // 3, kind, scale).any()
    exact = gradient(objective(student, teacher, rewards, BETA), student)
    assert (expected_gradient(student, teacher, torch.zeros(27, dtype=torch.float64), BETA) - exact).abs().max() < 1e-9


def test_at_the_teacher_the_first_gradient_is_the_rewards_alone(toy):
    _, teacher, rewards = toy
    student = teacher.clone().requires_grad_()
    found = expected_gradient(student, teacher, rewards, BETA)
    assert (found - gradient(objective(student, teacher, rewards, 0.0), student)).abs().max() < 1e-9


def test_the_optimum_is_the_teacher_tilted_by_the_reward(toy):
    """q* = p e^(R / beta) / Z, reached by steps along the expected gradient."""
    student, teacher, rewards = toy
    student = student.detach().requires_grad_()
    optimizer = torch.optim.LBFGS([student], lr=1, max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        student.grad = -expected_gradient(student, teacher, rewards, BETA)
        return -objective(student, teacher, rewards, BETA).detach()

    for _ in range(5):
        optimizer.step(closure)
    best = (token_logps(teacher)[0].sum(1) + rewards / BETA).softmax(0)
    assert (token_logps(student)[0].sum(1).exp() - best).abs().max() < 1e-6


def test_text_of_another_sampler_has_the_weight_of_its_whole_row(toy):
    student, teacher, rewards = toy
    drawn = token_logps(table(4))[0]
    q = token_logps(student)[0]
    _, through = sampler_weights(q - drawn, MASK, "prefix")
    policy = policy_term(q, rewards[:, None], weights=through[:, -1:])
    found = -gradient((drawn.sum(1).exp()[:, None] * policy).sum(), student)
    assert (found - gradient(objective(student, teacher, rewards, 0.0), student)).abs().max() < 1e-9


# ---- Advantages -----------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 5.0, math.nan, 2.0, 4.0]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    assert group_advantages(rewards, groups, "leave_one_out").tolist() == pytest.approx([1, -0.5, -0.5, 0, 0, -2, 2])
    assert group_advantages(rewards, groups, "group").tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, -1, 1])
    assert group_advantages(rewards, groups, "none").tolist() == [1, 0, 0, 5, 0, 2, 4]
    assert spread_of_groups(rewards, groups).tolist() == pytest.approx([1 / math.sqrt(3), 0, math.sqrt(2)])
    assert group_advantages(rewards[:0], groups[:0], "leave_one_out").shape == (0,)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigurationError, match="advantage: mean.*leave_one_out"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), "mean")


# ---- The term -------------------------------------------------------------------------------------------------------


def test_clipping_is_that_of_ppo():
    logps = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    term = policy_term(logps, advantages, weights=ratio, ratio=ratio, clip_range=0.2)
    assert term.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -1.1])
    assert gradient(term.sum(), logps).tolist() == pytest.approx([0, 1.5, -0.5, 0, -1.1])


def test_rlsd_never_turns_an_advantage():
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0])
    deltas = torch.tensor([0.1, -5.0, 0.1, -5.0, 3.0])
    found = rlsd_advantages(advantages, deltas, 1.0, 0.2)
    assert found.tolist() == pytest.approx([2 * math.exp(0.1), 1.6, -2 * math.exp(-0.1), -2.4, 0.0])
    assert torch.equal(rlsd_advantages(advantages, deltas, 0.0, 0.2), advantages)
    assert rlsd_advantages(advantages, deltas, 0.5, 0.2)[1] == pytest.approx(2 * (0.5 + 0.5 * 0.8))


@pytest.mark.parametrize("divergence", [forward_kl, jsd])
def test_a_token_that_the_teacher_excludes_leaves_all_finite(divergence):
    """log p = -inf of some sampled tokens, as behind a mask of the vocabulary."""
    logits = table(1)[:4].requires_grad_()
    ids = torch.tensor([0, 1, 1, 2])
    p_all = table(2)[:4].index_fill(1, torch.tensor([1]), -math.inf).log_softmax(-1)
    q_all = logits.log_softmax(-1)
    q, p = q_all.gather(1, ids[:, None])[:, 0], p_all.gather(1, ids[:, None])[:, 0]
    advantages = torch.tensor([1.0, 0.0, 2.0, -1.0], dtype=torch.float64)
    weighted = rlsd_advantages(advantages, (p - q).detach(), 1.0, 0.2)
    assert weighted[1:3].tolist() == [0, 2 * 0.8]
    weights = iw_opd_weights((p - q)[None], torch.ones(1, 4).bool(), 0.5)[0]
    assert weights.tolist() == [1.5, 1.5, 1.25, 1.0]
    loss = (policy_term(q, weighted) + weights * divergence(q_all, p_all)).sum()
    assert loss.isfinite() and gradient(loss, logits).isfinite().all()


def test_iw_opd_falls_from_the_first_token_on():
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]).bool()
    ratios = torch.tensor([[9.0, -1.0, 2.0, 1.0], [math.nan, 0.0, 0.0, math.inf]])
    weights = iw_opd_weights(ratios, mask, 0.5)
    assert weights.tolist() == [[0, 1.5, pytest.approx(1.375), pytest.approx(1.125)], [0, 1.5, 1.5, 0]]
