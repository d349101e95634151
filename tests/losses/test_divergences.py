"""Divergences against naive float64 references written in probabilities, and the limits that tell right from wrong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill_trainers.losses import (
    DIVERGENCES,
    adaptive_kl,
    forward_kl,
    jsd,
    lk,
    logit_mse,
    resolve_divergence,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    taid,
    token_divergence,
    total_variation,
)
from distill_trainers.losses.divergences import _without_negative_rounding, adaptive_kl_head_weight
from distill_trainers.signals import TokenLogits

ALL = list(DIVERGENCES)


def logits_pair(tokens: int = 5, ids: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(tokens, ids, generator=generator, dtype=torch.float64)
    teacher = spread * torch.randn(tokens, ids, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def at_logits(function, student: Tensor, teacher: Tensor, **params) -> Tensor:
    return function(F.log_softmax(student, -1), F.log_softmax(teacher, -1), **params)


def logits_gradient(function, student: Tensor, teacher: Tensor, **params) -> Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(at_logits(function, student, teacher, **params).sum(), student)[0]


# References: one token, an explicit sum over ids, probabilities and their logarithms.
def kl_by_hand(p: Tensor, q: Tensor) -> Tensor:
    return sum(p[i] * torch.log(p[i] / q[i]) for i in range(len(p)))


def adaptive_by_hand(z_q: Tensor, z_p: Tensor, mu: float = 0.5) -> Tensor:
    q, p = torch.softmax(z_q, 0), torch.softmax(z_p, 0)
    head, mass = [], 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i].item()):
        if mass < mu:
            head.append(i)
            mass += p[i].item()
    gaps = [abs(p[i].item() - q[i].item()) for i in range(len(p))]
    in_head = sum(gaps[i] for i in head)
    return (in_head * kl_by_hand(p, q) + (sum(gaps) - in_head) * kl_by_hand(q, p)) / sum(gaps)


def jsd_by_hand(z_q: Tensor, z_p: Tensor, beta: float = 0.5) -> Tensor:
    q, p = torch.softmax(z_q, 0), torch.softmax(z_p, 0)
    m = beta * p + (1 - beta) * q
    return beta * kl_by_hand(p, m) + (1 - beta) * kl_by_hand(q, m)


def skew_forward_by_hand(z_q: Tensor, z_p: Tensor, alpha: float = 0.1) -> Tensor:
    q, p = torch.softmax(z_q, 0), torch.softmax(z_p, 0)
    return kl_by_hand(p, alpha * p + (1 - alpha) * q)


def skew_reverse_by_hand(z_q: Tensor, z_p: Tensor, alpha: float = 0.1) -> Tensor:
    q, p = torch.softmax(z_q, 0), torch.softmax(z_p, 0)
    return kl_by_hand(q, (1 - alpha) * p + alpha * q)


def taid_by_hand(z_q: Tensor, z_p: Tensor, t: float = 0.4) -> Tensor:
    return kl_by_hand(torch.softmax((1 - t) * z_q.detach() + t * z_p, 0), torch.softmax(z_q, 0))


def total_variation_by_hand(z_q: Tensor, z_p: Tensor) -> Tensor:
    return F.l1_loss(torch.softmax(z_q, 0), torch.softmax(z_p, 0), reduction="sum") / 2


def lk_by_hand(z_q: Tensor, z_p: Tensor, kl_weight: float = 0.5) -> Tensor:
    kl = kl_by_hand(torch.softmax(z_p, 0), torch.softmax(z_q, 0))
    return kl_weight * kl + (1 - kl_weight) * total_variation_by_hand(z_q, z_p)


def mse_by_hand(z_q: Tensor, z_p: Tensor) -> Tensor:
    return F.mse_loss(z_q - z_q.mean(), z_p - z_p.mean())


REFERENCES = {
    "forward_kl": lambda z_q, z_p: kl_by_hand(torch.softmax(z_p, 0), torch.softmax(z_q, 0)),
    "reverse_kl": lambda z_q, z_p: kl_by_hand(torch.softmax(z_q, 0), torch.softmax(z_p, 0)),
    "jsd": jsd_by_hand,
    "skew_forward_kl": skew_forward_by_hand,
    "skew_reverse_kl": skew_reverse_by_hand,
    "adaptive_kl": adaptive_by_hand,
    "total_variation": total_variation_by_hand,
    "lk": lk_by_hand,
    "taid": taid_by_hand,
    "logit_mse": mse_by_hand,
}


def kl_of_rows(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def adaptive_of_rows(z_q: Tensor, z_p: Tensor, mu: float = 0.5) -> Tensor:
    q, p = z_q.softmax(0), z_p.softmax(0)
    order = p.argsort(descending=True)
    head = order[: int((p[order].cumsum(0) < mu).sum()) + 1]
    gaps = (p - q).abs().detach()
    share = gaps[head].sum() / gaps.sum()
    return share * kl_of_rows(p, q) + (1 - share) * kl_of_rows(q, p)


def mixed(function, z_q: Tensor, z_p: Tensor, share: float) -> Tensor:
    q, p = z_q.softmax(0), z_p.softmax(0)
    return function(p, q, share * p + (1 - share) * q)


# The same for many ids: 50,000 terms by hand take a minute.
REFERENCES_OF_ROWS = {
    "forward_kl": lambda z_q, z_p: kl_of_rows(z_p.softmax(0), z_q.softmax(0)),
    "reverse_kl": lambda z_q, z_p: kl_of_rows(z_q.softmax(0), z_p.softmax(0)),
    "jsd": lambda z_q, z_p, beta=0.5: mixed(
        lambda p, q, m: beta * kl_of_rows(p, m) + (1 - beta) * kl_of_rows(q, m), z_q, z_p, beta
    ),
    "skew_forward_kl": lambda z_q, z_p, alpha=0.1: mixed(lambda p, q, m: kl_of_rows(p, m), z_q, z_p, alpha),
    "skew_reverse_kl": lambda z_q, z_p, alpha=0.1: mixed(lambda p, q, m: kl_of_rows(q, m), z_q, z_p, 1 - alpha),
    "adaptive_kl": adaptive_of_rows,
    "taid": lambda z_q, z_p, t=0.4: kl_of_rows(((1 - t) * z_q.detach() + t * z_p).softmax(0), z_q.softmax(0)),
    "logit_mse": mse_by_hand,
}

CASES = [(name, {}) for name in ALL] + [
    *(("jsd", {"beta": beta}) for beta in (0.01, 0.1, 0.9, 0.99)),
    *(("skew_forward_kl", {"alpha": alpha}) for alpha in (0, 0.01, 0.5, 0.95)),
    *(("skew_reverse_kl", {"alpha": alpha}) for alpha in (0, 0.01, 0.5, 0.95)),
    *(("lk", {"kl_weight": weight}) for weight in (0, 0.1, 0.9, 1)),
    *(("adaptive_kl", {"mu": mu}) for mu in (0.05, 0.3, 0.9)),
    *(("taid", {"t": t}) for t in (0.0, 0.7, 1.0)),
]


def test_every_divergence_has_a_reference():
    assert set(REFERENCES) == set(DIVERGENCES)


@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_equal_the_naive_reference(name, params, seed):
    z_q, z_p = logits_pair(seed=seed)
    by_hand = z_q.clone().requires_grad_()
    expected = torch.stack([REFERENCES[name](a, b, **params) for a, b in zip(by_hand, z_p, strict=True)])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), by_hand)

    torch.testing.assert_close(at_logits(DIVERGENCES[name], z_q, z_p, **params), expected, rtol=1e-10, atol=1e-13)
    gradient = logits_gradient(DIVERGENCES[name], z_q, z_p, **params)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-13)


# The adaptive weights and TAID's target are constants by definition, so finite differences do not apply to them.
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("adaptive_kl", "taid")])
def test_gradcheck(name):
    z_q, z_p = logits_pair(tokens=2, ids=5)
    assert torch.autograd.gradcheck(lambda z: at_logits(DIVERGENCES[name], z, z_p), z_q.requires_grad_())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("dtype", "ids"), [(torch.float32, 50_257), (torch.float64, 11)])
def test_exactly_zero_at_equality(name, dtype, ids):
    z, _ = logits_pair(tokens=3, ids=ids, dtype=dtype, spread=4.0)
    assert (at_logits(DIVERGENCES[name], z, z) == 0).all()
    assert logits_gradient(DIVERGENCES[name], z, z).abs().max() < 40 * torch.finfo(dtype).eps  # rounding gave 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("distance", [1e-7, 1e-5, 1e-3, 1.0])
def test_never_negative_in_float32(name, distance):
    z_q, noise = logits_pair(tokens=20, ids=3000, dtype=torch.float32, spread=3.0)
    assert (at_logits(DIVERGENCES[name], z_q, z_q + distance * noise) >= 0).all()


def test_removing_negative_rounding_leaves_the_gradient():
    values = torch.tensor([-0.01, 0.0, 0.2], requires_grad=True)
    positive = _without_negative_rounding(values)
    torch.testing.assert_close(positive.detach(), torch.tensor([0.0, 0.0, 0.2]))
    torch.testing.assert_close(torch.autograd.grad(positive.sum(), values)[0], torch.ones(3))


# A student next to its teacher. Values are near distance^2, and each gradient is the difference of two numbers that
# agree in their first 3 or 4 digits. Bounds are ten times what was measured (docs/maths.md).
NEAR = [
    (name, params)
    for name, params in [*CASES, ("skew_forward_kl", {"alpha": 0.9}), ("skew_reverse_kl", {"alpha": 0.9})]
    if params != {"t": 0.0} and name not in ("total_variation", "lk")  # whose gradient has a sign in it
]


@pytest.mark.parametrize(("name", "params"), NEAR)
@pytest.mark.parametrize("by", ["closed form", "autograd"])
def test_near_equality_float32_keeps_its_digits(name, params, by):
    z_q, noise = logits_pair(tokens=2, ids=50_000, spread=3.0)
    for distance, in_value, in_gradient in ((1e-2, 2e-4, 1.5e-3), (1e-3, 2e-3, 1.5e-2)):
        student, teacher = z_q.float(), (z_q + distance * noise / 3).float()
        divergence = resolve_divergence(name, **params)
        if by == "closed form":
            logits = student.clone().requires_grad_()
            value = token_divergence(divergence, TokenLogits(logits), TokenLogits(teacher))
            gradient = torch.autograd.grad(value.sum(), logits)[0]
        else:
            value, gradient = (f(divergence, student, teacher) for f in (at_logits, logits_gradient))
        double = student.double().requires_grad_()
        exact = torch.stack(
            [REFERENCES_OF_ROWS[name](a, b, **params) for a, b in zip(double, teacher.double(), strict=True)]
        )
        (exact_gradient,) = torch.autograd.grad(exact.sum(), double)
        assert (value.double() - exact).norm() <= in_value * exact.norm()
        assert (gradient.double() - exact_gradient).norm() <= in_gradient * exact_gradient.norm()


def test_total_variation_near_equality():
    z_q, noise = logits_pair(tokens=2, ids=50_000, spread=3.0)
    student, teacher = z_q.float(), (z_q + 1e-3 * noise / 3).float()
    exact = (teacher.double().softmax(-1) - student.double().softmax(-1)).abs().sum(-1) / 2
    torch.testing.assert_close(at_logits(total_variation, student, teacher).double(), exact, rtol=2e-4, atol=0)
    pairs = zip(teacher.double().softmax(-1), student.double().softmax(-1), strict=True)
    kl = torch.stack([kl_of_rows(p, q) for p, q in pairs])
    found = at_logits(lk, student, teacher, kl_weight=0.3).double()
    torch.testing.assert_close(found, 0.3 * kl + 0.7 * exact, rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_teacher_gets_no_gradient(name):
    z_q, z_p = (z.requires_grad_() for z in logits_pair())
    at_logits(DIVERGENCES[name], z_q, z_p).sum().backward()
    assert z_p.grad is None
    assert z_q.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ALL)
def test_leading_axes_are_kept(name):
    z_q, z_p = logits_pair(tokens=6)
    flat = at_logits(DIVERGENCES[name], z_q, z_p)
    torch.testing.assert_close(at_logits(DIVERGENCES[name], z_q.view(2, 3, 7), z_p.view(2, 3, 7)), flat.view(2, 3))
    assert at_logits(DIVERGENCES[name], z_q[:0], z_p[:0]).shape == (0,)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(name, dtype):
    rows = torch.tensor(
        [[0.0, -1e4, 3.0, -2.0], [1e4, 0.0, 0.0, 0.0], [0.0, 1e4, 1.0, -95.0], [1.0, 2.0, 3.0, 4.0], [-95.0, 90, 0, 1]],
        dtype=dtype,
    )
    for z_q in rows:
        value = at_logits(DIVERGENCES[name], z_q.expand(5, 4), rows)
        gradient = logits_gradient(DIVERGENCES[name], z_q.expand(5, 4), rows)
        assert value.isfinite().all() and (value >= 0).all()
        assert gradient.isfinite().all()


BOUNDED_AT_ZERO_TEACHER = [name for name in ALL if name not in ("reverse_kl", "adaptive_kl", "logit_mse")]


@pytest.mark.parametrize("name", BOUNDED_AT_ZERO_TEACHER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teacher_probability_zero_is_the_limit_of_small_ones(name, dtype):
    z_q, z_p = logits_pair(dtype=dtype)
    z_p[:, 2] = -1e4
    value, gradient = (f(DIVERGENCES[name], z_q, z_p) for f in (at_logits, logits_gradient))
    z_p[:, 2] = -math.inf
    torch.testing.assert_close(at_logits(DIVERGENCES[name], z_q, z_p), value)
    torch.testing.assert_close(logits_gradient(DIVERGENCES[name], z_q, z_p), gradient)


@pytest.mark.parametrize("name", [name for name in ALL if name != "logit_mse"])
@pytest.mark.parametrize("masked", [-1e4, -math.inf])
def test_an_id_that_neither_can_say_changes_nothing(name, masked):
    z_q, z_p = logits_pair(dtype=torch.float32)
    value, gradient = (f(DIVERGENCES[name], z_q, z_p) for f in (at_logits, logits_gradient))
    z_q, z_p = F.pad(z_q, (0, 1), value=masked), F.pad(z_p, (0, 1), value=-math.inf)
    torch.testing.assert_close(at_logits(DIVERGENCES[name], z_q, z_p), value)
    torch.testing.assert_close(logits_gradient(DIVERGENCES[name], z_q, z_p), F.pad(gradient, (0, 1)))


def test_reverse_kl_is_infinite_where_only_the_student_puts_mass():
    value = at_logits(reverse_kl, torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]]))
    assert value.item() == math.inf


# Limits and bounds of METHODS section 1.
def test_jsd_limits_are_the_two_kls():
    z_q, z_p = logits_pair()
    tiny = 1e-7
    forward, reverse = at_logits(forward_kl, z_q, z_p), at_logits(reverse_kl, z_q, z_p)
    torch.testing.assert_close(at_logits(jsd, z_q, z_p, beta=tiny) / tiny, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(at_logits(jsd, z_q, z_p, beta=1 - tiny) / tiny, reverse, rtol=1e-4, atol=0)
    assert torch.equal(at_logits(jsd, z_q, z_p, beta=0), forward)
    assert torch.equal(at_logits(jsd, z_q, z_p, beta=1.0), reverse)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_is_bounded_by_the_entropy_of_beta_and_reaches_it(beta):
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    z_q, z_p = logits_pair(tokens=50, spread=20.0)
    assert (at_logits(jsd, z_q, z_p, beta=beta) <= bound + 1e-12).all()
    apart = 1e3 * torch.eye(2, dtype=torch.float64)
    assert at_logits(jsd, apart, apart.flip(0), beta=beta).tolist() == pytest.approx([bound, bound])


@pytest.mark.parametrize(("name", "matters"), [("skew_forward_kl", True), ("skew_reverse_kl", True), ("jsd", False)])
def test_the_student_inside_the_mixture_is_live(name, matters):
    """In JSD what flows through the mixture is the sum of dm, and cancels; in either skew KL alone it does not."""

    def mixture_detached(student, teacher):
        p, q = teacher.exp(), student.exp()
        share = {"skew_forward_kl": 0.1, "skew_reverse_kl": 0.9, "jsd": 0.5}[name]
        log_m = (share * p + (1 - share) * q).log().detach()
        to_mixture = (p * (teacher - log_m)).sum(-1), (q * (student - log_m)).sum(-1)
        weights = {"skew_forward_kl": (1, 0), "skew_reverse_kl": (0, 1), "jsd": (0.5, 0.5)}[name]
        return weights[0] * to_mixture[0] + weights[1] * to_mixture[1] + 0 * student.sum(-1)

    z_q, z_p = logits_pair()
    torch.testing.assert_close(at_logits(DIVERGENCES[name], z_q, z_p), at_logits(mixture_detached, z_q, z_p))
    live, detached = (logits_gradient(f, z_q, z_p) for f in (DIVERGENCES[name], mixture_detached))
    assert torch.allclose(live, detached, rtol=1e-6, atol=1e-12) != matters


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_is_the_mixture_of_skews_by_hand(beta):
    z_q, z_p = logits_pair()
    mixture = [
        beta * skew_forward_by_hand(a, b, beta) + (1 - beta) * skew_reverse_by_hand(a, b, 1 - beta)
        for a, b in zip(z_q, z_p, strict=True)
    ]
    torch.testing.assert_close(at_logits(jsd, z_q, z_p, beta=beta), torch.stack(mixture))


@pytest.mark.parametrize("skewed", [skew_forward_kl, skew_reverse_kl])
@pytest.mark.parametrize("alpha", [1e-4, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skew_is_bounded_by_minus_log_alpha_and_reaches_it(skewed, alpha, dtype):
    z_q, z_p = logits_pair(tokens=50, spread=20.0, dtype=dtype)
    slack = 1e-3 if dtype == torch.float32 and alpha < 1e-3 else 1e-5
    assert (at_logits(skewed, z_q, z_p, alpha=alpha) <= -math.log(alpha) + slack).all()
    apart = 1e3 * torch.eye(2, dtype=dtype)
    assert at_logits(skewed, apart, apart.flip(0), alpha=alpha).tolist() == pytest.approx([-math.log(alpha)] * 2, 1e-3)


@pytest.mark.parametrize(("skewed", "plain"), [(skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)])
def test_skew_without_skew_is_the_plain_kl(skewed, plain):
    z_q, z_p = logits_pair()
    assert torch.equal(at_logits(skewed, z_q, z_p, alpha=0), at_logits(plain, z_q, z_p))
    torch.testing.assert_close(at_logits(skewed, z_q, z_p, alpha=1e-9), at_logits(plain, z_q, z_p), rtol=1e-5, atol=0)


def test_reverse_kl_is_not_a_cross_entropy():
    _, z_p = logits_pair(tokens=1, spread=1.0)
    z_q = torch.zeros_like(z_p, requires_grad=True)
    optimizer = torch.optim.LBFGS([z_q], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = at_logits(reverse_kl, z_q, z_p).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    p = z_p.softmax(-1)
    torch.testing.assert_close(z_q.detach().softmax(-1), p, rtol=0, atol=1e-3)
    one_hot = 50 * F.one_hot(z_p.argmax(-1), z_p.shape[-1]).double()
    assert at_logits(reverse_kl, one_hot, z_p).item() == pytest.approx(-p.max().log().item())
    assert at_logits(reverse_kl, z_q.detach(), z_p).item() < 1e-6
    cross_entropy = [-(z.softmax(-1) * p.log()).sum().item() for z in (one_hot, z_p)]
    assert cross_entropy[0] < cross_entropy[1]  # the loss that it must not be prefers the one-hot to the teacher


def test_adaptive_weights_sum_to_one_and_are_constants():
    z_q, z_p = logits_pair(tokens=30)
    forward, reverse = at_logits(forward_kl, z_q, z_p), at_logits(reverse_kl, z_q, z_p)
    value = at_logits(adaptive_kl, z_q, z_p)
    assert (value >= torch.minimum(forward, reverse) - 1e-12).all()
    assert (value <= torch.maximum(forward, reverse) + 1e-12).all()
    weight = at_logits(adaptive_kl_head_weight, z_q.requires_grad_(), z_p)
    assert not weight.requires_grad
    torch.testing.assert_close(weight * forward + (1 - weight) * reverse, value)


def test_adaptive_head_is_the_smallest_set_that_reaches_the_mass():
    p = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    half = pytest.approx(0.5)  # a logarithm and back may end a rounding beside 0.5, which is why mu is not 0.5 either
    assert adaptive_kl_head_weight(q.log(), p.log(), mu=0.49).item() == half  # {0}: it reaches 0.49 alone
    assert adaptive_kl_head_weight(q.log(), p.log(), mu=0.51).item() >= 0.5 - 1e-9  # one of the ties joins
    assert adaptive_kl_head_weight(q.log(), p.log(), mu=1.0).item() == pytest.approx(1.0)
    assert adaptive_kl_head_weight(q.log(), p.log(), mu=0.0).item() == 0.0
    assert adaptive_kl_head_weight(p.log(), p.log()).item() == 0.5  # no gap at all


def test_total_variation_lies_between_zero_and_one():
    z_q, z_p = logits_pair(tokens=50, spread=20.0)
    assert (at_logits(total_variation, z_q, z_p) <= 1 + 1e-12).all()
    apart = 1e3 * torch.eye(2)
    assert at_logits(total_variation, apart, apart.flip(0)).tolist() == [1.0, 1.0]


def test_total_variation_is_what_speculative_decoding_rejects():
    """A draft v ~ q is accepted with probability min(1, p / q): in all with Σ q min(1, p / q) = Σ min(p, q)."""
    z_q, z_p = logits_pair(tokens=20)
    q, p = z_q.softmax(-1), z_p.softmax(-1)
    rejected = at_logits(total_variation, z_q, z_p)
    torch.testing.assert_close(rejected + torch.minimum(p, q).sum(-1), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close((q * (p / q).clamp(max=1)).sum(-1), 1 - rejected)


@pytest.mark.parametrize(("weight", "end"), [(1, forward_kl), (0, total_variation)])
def test_lk_ends_at_the_kl_and_at_the_total_variation(weight, end):
    z_q, z_p = logits_pair()
    for near, rtol in ((weight, 0), (abs(weight - 1e-7), 1e-5)):
        torch.testing.assert_close(at_logits(lk, z_q, z_p, kl_weight=near), at_logits(end, z_q, z_p), rtol=rtol, atol=0)
        gradients = logits_gradient(lk, z_q, z_p, kl_weight=near), logits_gradient(end, z_q, z_p)
        torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-6 * (near != weight))


def test_taid_ends():
    z_q, z_p = logits_pair()
    assert (at_logits(taid, z_q, z_p, t=0) == 0).all()
    assert logits_gradient(taid, z_q, z_p, t=0).abs().max() < 1e-14
    torch.testing.assert_close(at_logits(taid, z_q, z_p, t=1), at_logits(forward_kl, z_q, z_p))
    expected = logits_gradient(forward_kl, z_q, z_p)
    torch.testing.assert_close(logits_gradient(taid, z_q, z_p, t=1), expected)


def test_mse_is_shift_invariant_and_the_same_for_logits_and_log_probabilities():
    z_q, z_p = logits_pair()
    expected = logit_mse(z_q, z_p)
    torch.testing.assert_close(logit_mse(z_q + 5, z_p - torch.arange(5.0, dtype=torch.float64)[:, None]), expected)
    torch.testing.assert_close(at_logits(logit_mse, z_q, z_p), expected)


@pytest.mark.parametrize("masked", ["student", "teacher", "student and teacher"])
@pytest.mark.parametrize("by", ["closed form", "autograd"])
def test_mse_leaves_out_ids_that_one_of_both_cannot_say(masked, by):
    z_q, z_p = logits_pair()
    expected, expected_gradient = logit_mse(z_q, z_p), 2 * (z_q - z_p - (z_q - z_p).mean(-1, keepdim=True)) / 7
    z_q = F.pad(z_q, (1, 1), value=-math.inf if "student" in masked else 3.0)
    z_p = F.pad(z_p, (1, 1), value=-math.inf if "teacher" in masked else 3.0)
    z_q = z_q.requires_grad_()
    logits = TokenLogits(z_q), TokenLogits(z_p)
    value = token_divergence("logit_mse", *logits) if by == "closed form" else logit_mse(z_q, z_p)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z_q)[0], F.pad(expected_gradient, (1, 1)))
