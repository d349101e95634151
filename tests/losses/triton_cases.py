"""The Triton kernels against the same losses by torch in float64: on a GPU, or in Triton's interpreter on a CPU.

`test_triton.py` runs this file in a process of its own, since Triton decides for its interpreter when it is imported.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill_trainers.losses import DIVERGENCES, fused_linear_divergence, kernels, token_divergence, triton_kernel
from distill_trainers.losses.fused_linear import fused_linear_terms
from distill_trainers.losses.raw_logits import RawLogits
from distill_trainers.losses.sparse import token_logps
from distill_trainers.signals import Head, HiddenStates, TokenLogits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, DS, DT, V, BLOCK = 2, 6, 4, 21, 16  # the last block of a row is not full
FORMS = [
    *((name, {}) for name in DIVERGENCES if name != "adaptive_kl"),
    *(("jsd", {"beta": beta}) for beta in (0, 0.1, 1)),
    ("skew_forward_kl", {"alpha": 0.9}),
    ("skew_reverse_kl", {"alpha": 0}),
    ("lk", {"kl_weight": 0}),
    ("lk", {"kl_weight": 0.9}),
    ("taid", {"t": 0.8}),
]
AGREES = kernels._agrees
CLOSED = [name for name, params in FORMS if not params]


@pytest.fixture
def on(monkeypatch):
    """Kernels on this device, which count as tried."""
    monkeypatch.setattr(triton_kernel, "BLOCK", BLOCK)
    monkeypatch.setattr(kernels, "may_run", lambda device: kernels._are_wanted)
    monkeypatch.setattr(kernels, "_verdicts", {})
    monkeypatch.setattr(kernels, "_agrees", lambda *args: True)
    return triton_kernel


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def operands(dtype: torch.dtype, bias: bool, padded: bool, tokens: int = N) -> list[Tensor]:
    """Hidden states, weight and bias of the student, then of the teacher, exact in `dtype`; None without a bias."""
    ids = V + 3 * padded
    made = [rand(tokens, DS, seed=1), rand(ids, DS, seed=2), rand(ids, seed=3)]
    made += [rand(tokens, DT, seed=4), rand(ids + padded, DT, seed=5), rand(ids + padded, seed=6)]
    made = [each.to(torch.bfloat16).to(dtype) for each in made]
    return [each if bias or each.ndim > 1 else None for each in made]


def loss_of(given: list[Tensor], **options) -> tuple[Tensor, ...]:
    """Loss and gradients of the student's, in float64."""
    learned = [each.clone().requires_grad_() for each in given[:3] if each is not None]
    loss = fused_linear_divergence(
        *learned[:2],
        *given[3:5],
        student_bias=learned[2] if len(learned) > 2 else None,
        teacher_bias=given[5],
        token_weight=torch.tensor([-0.5, 2.0, 0.7])[: len(given[0])].to(given[0]),
        **options,
    )
    return tuple(each.double() for each in (loss, *torch.autograd.grad(loss, learned)))


def check(form, dtype, bias, scale, soft_cap, temperature, padded) -> None:
    name, params = form
    options = {"divergence": name, "temperature": temperature, **params}
    options |= {"student_scale": scale, "teacher_scale": 2 * scale, "student_soft_cap": soft_cap}
    options |= {"teacher_soft_cap": soft_cap and soft_cap + 1, "vocab_size": V if padded else None}
    given = operands(dtype, bias, padded)
    found = loss_of(given, **options)
    with kernels.without_kernels():
        exact = loss_of([each if each is None else each.double() for each in given], **options)
    near = 3e-5 if dtype == torch.float32 else 8e-3  # gradients are rounded to bfloat16 at the end
    torch.testing.assert_close(found[0], exact[0], rtol=3e-5, atol=3e-6)
    for mine, expected in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(mine, expected, rtol=near, atol=near * expected.abs().max().item())


# Bias, scale, soft cap, temperature, padding and dtype: any two of them together in each of their combinations.
PAIRWISE = [(a, b, c, a ^ b, a ^ c, a ^ b ^ c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("choice", PAIRWISE, ids=str)
def test_value_and_gradients_equal_float64_by_torch(form, choice, on):
    bias, cap, padded, scaled, warm, narrow = choice
    dtype = torch.bfloat16 if narrow else torch.float32
    check(form, dtype, bool(bias), 0.4 if scaled else 1.0, 2.5 if cap else None, 2.0 if warm else 1.0, bool(padded))


@pytest.mark.parametrize("form", FORMS[: len(CLOSED)], ids=str)
def test_a_whole_head_at_a_temperature(form, on):
    check(form, torch.float32, True, 0.4, 2.5, 2.0, True)


@pytest.mark.parametrize("name", CLOSED)
def test_extreme_logits_are_what_torch_makes_of_them(name, on):
    """Huge, masked on one side or both, and NaN; in a block of its own where nothing else is, too."""
    inf = math.inf
    student = torch.tensor([[1e4, 0.0, -inf, 3.0], [-95.0, 90.0, 0.0, -1e4], [math.nan, 0.0, 1.0, 2.0]])
    teacher = torch.tensor([[0.0, 1e4, -inf, -95.0], [1.0, -inf, 3.0, 2.0], [0.0, 0.0, 1.0, 2.0]])
    if name in ("reverse_kl", "logit_mse"):
        teacher[1, 1] = -2e3  # infinite, or without a distance
    masked = torch.full((3, BLOCK), -inf)
    student, teacher = (torch.cat([masked, each], 1).to(DEVICE) for each in (student, teacher))
    found = by(name, student, teacher)
    with kernels.without_kernels():
        expected = by(name, student, teacher)
    for mine, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert found[0][2].isnan() and found[0][:2].isfinite().all()


@pytest.mark.parametrize("name", CLOSED)
def test_equality_is_exact_and_nearness_keeps_its_digits(name, on):
    student = 3 * rand(2, V, seed=1).float()
    teacher = student.clone()
    teacher[1] += 1e-3 * rand(V, seed=2).float()
    value, gradient = by(name, student, teacher)
    assert value[0] == 0 and gradient[0].abs().max() < 1e-6
    exact, exact_gradient = by(name, student.double(), teacher.double())
    assert value[1].item() == pytest.approx(exact[1].item(), rel=1e-3, abs=0)
    assert (gradient[1] - exact_gradient[1]).norm() <= 2e-3 * exact_gradient[1].norm()


def by(name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    values = token_divergence(name, TokenLogits(student), TokenLogits(teacher))
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def test_logits_in_bfloat16_and_with_gaps_between_rows(on):
    """As they are where a head cannot be fused: cut from wider ones, here in a narrower dtype than ours ever are."""
    wide = (2 * rand(3, V + 5, seed=1)).bfloat16(), (2 * rand(3, V + 7, seed=2)).bfloat16()
    leaf = wide[0].clone().requires_grad_()
    values = token_divergence("jsd", TokenLogits(leaf[:, :V]), TokenLogits(wide[1][:, :V]), 2.0)
    gradient = torch.autograd.grad(values.sum(), leaf)[0]
    with kernels.without_kernels():
        exact = wide[0].double().requires_grad_()
        expected = token_divergence("jsd", TokenLogits(exact[:, :V]), TokenLogits(wide[1].double()[:, :V]), 2.0)
        expected_gradient = torch.autograd.grad(expected.sum(), exact)[0]
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=8e-3, atol=1e-6)


@pytest.fixture
def written(on, monkeypatch):
    """Whether each gradient took the place of the student's products."""
    seen, plain = [], on.Launch.gradient

    def gradient(self, kept, factors, out):
        seen.append(out.data_ptr() == self.student.values.data_ptr())
        return plain(self, kept, factors, out)

    monkeypatch.setattr(on.Launch, "gradient", gradient)
    return seen


HEAD = {"scale": 0.5, "soft_cap": 3.0}


@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "scale and soft cap"])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "with other terms"])
def test_the_products_are_overwritten_only_if_nobody_else_takes_them(others, head, written):
    def terms(student, teacher, tokens):
        made = {"jsd": tokens["weight"] * token_divergence("jsd", student, teacher), "seen": student.logits[:, 0]}
        if others:
            made |= {
                "nll": -token_logps(student, tokens["ids"]),
                "kl": token_divergence("forward_kl", student, teacher),
            }
        return made

    weights = {"jsd": 1.0, **({"nll": 0.5, "kl": 2.0} if others else {})}
    given = operands(torch.float32, bias=False, padded=False, tokens=3)

    def run(dtype):
        hidden, weight, _, teacher_hidden, teacher_weight, _ = (e if e is None else e.to(dtype) for e in given)
        learned = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        tokens = {"ids": torch.arange(3, device=DEVICE), "weight": torch.tensor([1.0, -0.5, 2.0]).to(weight)}
        signal = HiddenStates(teacher_hidden, Head(teacher_weight, **head))
        total, found = fused_linear_terms(
            learned[0], Head(learned[1], **head), signal, terms, tokens, weights, chunk_bytes=2 * V * 4
        )
        return [total, *torch.autograd.grad(total, learned), *found.values()]

    mine = run(torch.float32)
    assert written == [not others] * 2 * (2 if others else 1)
    with kernels.without_kernels():
        expected = run(torch.float64)
    for each, exact in zip(mine, expected, strict=True):
        torch.testing.assert_close(each.double(), exact, rtol=1e-4, atol=1e-5)


def test_without_a_gradient_nothing_is_written(written):
    student, teacher = (TokenLogits(rand(2, V, seed=seed).float()) for seed in (1, 2))
    assert token_divergence("jsd", student, teacher).shape == (2,) and not written
    empty = TokenLogits(torch.empty(0, V, requires_grad=True, device=DEVICE))
    assert token_divergence("jsd", empty, TokenLogits(torch.empty(0, V, device=DEVICE))).shape == (0,) and not written


# ---- What is tried before a kernel is trusted
@pytest.fixture
def untried(on, monkeypatch):
    monkeypatch.setattr(kernels, "_agrees", AGREES)
    return on


@pytest.mark.parametrize("name", CLOSED)
def test_kernels_that_agree_are_used(name, untried, caplog):
    student, teacher = (rand(2, V, seed=seed).float() for seed in (1, 2))
    token_divergence(name, RawLogits(student, Head(student, scale=0.5, soft_cap=4.0)), TokenLogits(teacher))
    assert list(kernels._verdicts.values()) == [True] and not caplog.records


@pytest.mark.parametrize("part", ["values", "gradient"])
@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_kernel_that_fails_is_told_and_not_used_again(part, fault, untried, monkeypatch, caplog):
    plain, calls = getattr(untried.Launch, part), []

    def faulty(self, *args):
        calls.append(part)
        if fault == "raises":
            raise RuntimeError("no compiler")
        made = plain(self, *args)
        (made if part == "gradient" else made[0])[-1] *= 1.02
        return made

    monkeypatch.setattr(untried.Launch, part, faulty)
    student, teacher = (rand(2, V, seed=seed).float() for seed in (1, 2))
    found = [by("jsd", student, teacher) for _ in range(2)]
    assert len(calls) == 1 and len(caplog.records) == 1 and "Triton kernel of jsd" in caplog.text
    with kernels.without_kernels():
        expected = by("jsd", student, teacher)
    for each in found:
        torch.testing.assert_close(each, expected, rtol=0, atol=0)


def test_rows_that_are_nan_decide_nothing(untried):
    student, teacher = torch.full((2, V), math.nan, device=DEVICE), rand(2, V, seed=2).float()
    assert by("jsd", student, teacher)[0].isnan().all() and kernels._verdicts == {}


def test_what_has_no_kernel_goes_another_way(on, monkeypatch):
    monkeypatch.setattr(on.Launch, "values", lambda self: pytest.fail("a kernel was used"))
    student, teacher = rand(2, V, seed=1), rand(2, V, seed=2)
    for name, dtype in (("jsd", torch.float64), ("adaptive_kl", torch.float32)):
        by(name, student.to(dtype), teacher.to(dtype))
