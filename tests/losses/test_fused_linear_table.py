"""Every divergence through every kind of head: value and gradients of the fused loss against dense float64 autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill_trainers.losses import (
    DIVERGENCES,
    fused_linear_divergence,
    fused_linear_terms,
    resolve_divergence,
    token_divergence,
    token_logps,
)
from distill_trainers.signals import Head, HiddenStates, Logits

N, DS, DT, V, PADDED = 9, 6, 4, 11, 13
HEADS = list(itertools.product((None, 2.5), (1.0, 0.4), (False, True), (False, True)))
PARAMS = {"jsd": {"beta": 0.3}, "taid": {"t": 0.6}, "adaptive_kl": {"mu": 0.7}}


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """Operands of both models in float64, a head's settings, and the loss by dense autograd."""

    def __init__(self, soft_cap, scale, bias, padded, tokens: int = N):
        rows = PADDED if padded else V
        self.operands = [rand(tokens, DS, seed=1), rand(rows, DS, seed=2), rand(tokens, DT, seed=3)]
        self.operands += [rand(rows + 2 * padded, DT, seed=4)]  # padded vocabularies of different lengths
        self.biases = [rand(rows, seed=5), rand(rows + 2 * padded, seed=6)] if bias else [None, None]
        self.soft_cap, self.scale, self.vocab_size = soft_cap, scale, V if padded else None
        self.token_weight = rand(tokens, seed=7)

    def logps(self, hidden, weight, bias, temperature):
        logits = F.linear(hidden, weight, bias)[:, : self.vocab_size] * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return F.log_softmax(logits / temperature, -1)

    def dense(self, divergence, temperature, learned):
        student = self.logps(*learned[:2], learned[2] if len(learned) > 2 else None, temperature)
        teacher = self.logps(*self.operands[2:], self.biases[1], temperature)
        return (self.token_weight * divergence(student, teacher)).sum()

    def learned(self, dtype) -> list[Tensor]:
        mine = [*self.operands[:2], *([] if self.biases[0] is None else [self.biases[0]])]
        return [each.to(dtype).requires_grad_() for each in mine]

    def fused(self, name, temperature, learned, dtype):
        teacher = [None if each is None else each.to(dtype) for each in (*self.operands[2:], self.biases[1])]
        return fused_linear_divergence(
            *learned[:2],
            *teacher[:2],
            divergence=name,
            temperature=temperature,
            token_weight=self.token_weight.to(dtype),
            student_bias=learned[2] if len(learned) > 2 else None,
            teacher_bias=teacher[2],
            student_scale=self.scale,
            teacher_scale=self.scale,
            student_soft_cap=self.soft_cap,
            teacher_soft_cap=self.soft_cap,
            vocab_size=self.vocab_size,
            chunk_bytes=4 * V * torch.finfo(dtype).bits // 8,
            **PARAMS.get(name, {}),
        )


def ids(head) -> str:
    soft_cap, scale, bias, padded = head
    names = ("soft cap", soft_cap is not None), ("scale", scale != 1), ("bias", bias), ("padded", padded)
    return "+".join(name for name, on in names if on) or "plain"


@pytest.mark.parametrize("head", HEADS, ids=ids)
@pytest.mark.parametrize("name", list(DIVERGENCES))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_equals_dense_float64(head, name, temperature):
    case, divergence = Case(*head), resolve_divergence(name, **PARAMS.get(name, {}))
    exact = case.learned(torch.float64)
    expected = case.dense(divergence, temperature, exact)
    expected_gradients = torch.autograd.grad(expected, exact)
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 3e-5)):
        learned = case.learned(dtype)
        loss = case.fused(name, temperature, learned, dtype)
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), expected, rtol=near, atol=near)
        for mine, reference in zip(torch.autograd.grad(loss, learned), expected_gradients, strict=True):
            torch.testing.assert_close(mine.double(), reference, rtol=near, atol=near)

        hidden, *head_of = learned
        frozen = case.fused(name, temperature, [hidden, *(each.detach() for each in head_of)], dtype)
        torch.testing.assert_close(
            torch.autograd.grad(frozen, hidden)[0].double(), expected_gradients[0], rtol=near, atol=near
        )
        with torch.no_grad():
            silent = case.fused(name, temperature, learned, dtype)
        assert not silent.requires_grad
        torch.testing.assert_close(silent, loss.detach(), rtol=near, atol=near)


@pytest.mark.parametrize("head", HEADS, ids=ids)
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_no_tokens_give_zero_and_zero_gradients(head, name):
    case = Case(*head, tokens=0)
    learned = case.learned(torch.float32)
    loss = case.fused(name, 2.0, learned, torch.float32)
    loss.backward()
    assert loss.item() == 0
    assert all(each.grad.shape == each.shape and not each.grad.any() for each in learned)


# Terms with and without a closed form, on the same logits
def mixed_terms(student, teacher, tokens):
    logps = student.logps()
    return {
        "jsd": token_divergence("jsd", student, teacher, 2.0),
        "adaptive": token_divergence("adaptive_kl", student, teacher),
        "reverse": tokens["weight"] * token_divergence("reverse_kl", student, teacher),
        "nll": -token_logps(student, tokens["labels"]),
        "entropy": -(logps.exp() * logps).sum(-1),
        "first": student.logits[:, 0],
    }


@pytest.mark.parametrize("head", HEADS, ids=ids)
@pytest.mark.parametrize("kind", ["hidden states", "logits"])
def test_mixed_terms_equal_dense_autograd(head, kind):
    case = Case(*head)
    learned = case.learned(torch.float64)
    tokens = {"labels": torch.arange(N) % V, "weight": case.token_weight}
    weights = {"jsd": 1.0, "adaptive": -0.5, "reverse": 0.3, "nll": 2.0, "entropy": 0.7, "first": 0.1}
    student_head = Head(
        learned[1], learned[2] if len(learned) > 2 else None, case.scale, case.soft_cap, case.vocab_size
    )
    teacher_head = Head(case.operands[3], case.biases[1], case.scale, case.soft_cap, case.vocab_size)
    teacher = HiddenStates(case.operands[2], teacher_head)
    teacher = teacher if kind == "hidden states" else Logits(teacher.chunk(slice(None)).logits)
    total, terms = fused_linear_terms(
        learned[0], student_head, teacher, mixed_terms, tokens, weights, chunk_bytes=4 * V * 8
    )

    q, q2 = (case.logps(*learned[:2], learned[2] if len(learned) > 2 else None, t) for t in (1.0, 2.0))
    p, p2 = (case.logps(*case.operands[2:], case.biases[1], t) for t in (1.0, 2.0))
    expected = {
        "jsd": DIVERGENCES["jsd"](q2, p2),
        "adaptive": DIVERGENCES["adaptive_kl"](q, p),
        "reverse": case.token_weight * DIVERGENCES["reverse_kl"](q, p),
        "nll": -q[torch.arange(N), tokens["labels"]],
        "entropy": -(q.exp() * q).sum(-1),
        "first": student_head.logits(learned[0])[:, 0],
    }
    for name, values in expected.items():
        torch.testing.assert_close(terms[name], values.detach())
    dense = sum(weights[name] * values.sum() for name, values in expected.items())
    torch.testing.assert_close(total, dense)
    gradients = torch.autograd.grad(total, learned), torch.autograd.grad(dense, learned)
    torch.testing.assert_close(*gradients)


def test_a_term_that_is_not_in_the_loss_leaves_no_trace():
    """Its closed-form gradient is made, as autograd cannot know, but goes nowhere."""
    case = Case(None, 1.0, False, False)
    learned = case.learned(torch.float64)
    head, teacher = Head(learned[1]), HiddenStates(case.operands[2], Head(case.operands[3]))

    def terms(student, teacher, tokens):
        return {name: token_divergence(name, student, teacher) for name in ("jsd", "forward_kl")}

    total, found = fused_linear_terms(learned[0], head, teacher, terms, {}, {"jsd": 1.0})
    plain = fused_linear_divergence(*learned, *case.operands[2:], divergence="jsd")
    torch.testing.assert_close(torch.autograd.grad(total, learned), torch.autograd.grad(plain, learned))
    torch.testing.assert_close(
        found["forward_kl"].sum(),
        fused_linear_divergence(*learned, *case.operands[2:], divergence="forward_kl").detach(),
    )
