"""Log-probabilities from hidden states and head: value and gradient against dense float64, at any chunk size."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_trainers.losses.fused_logps import (
    fused_row_terms,
    fused_token_logps,
    row_terms_of_logits,
    signal_token_logps,
)
from distill_trainers.losses.reduction import sum_per_row
from distill_trainers.signals import Head, HiddenStates, Logits

N, D, V = 13, 6, 17


def _operands(dtype=torch.float64, bias=True, **head):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    own_bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, Head(weight, own_bias, **head)


def _dense(hidden, head, ids):
    return head.logits(hidden).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


HEADS = [{}, {"scale": 0.3}, {"soft_cap": 2.0, "scale": 1.5}, {"vocab_size": 14}]


@pytest.mark.parametrize("chunk_bytes", [1, 5 * V * 8, 2**20])
@pytest.mark.parametrize("settings", HEADS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradient_equal_dense_ones(chunk_bytes, settings, bias):
    ids = torch.arange(N) % 14
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    grads = []
    for function in (lambda *a: fused_token_logps(*a, chunk_bytes=chunk_bytes), _dense):
        hidden, head = _operands(bias=bias, **settings)
        values = function(hidden, head, ids)
        (values * upstream).sum().backward()
        operands = [hidden, head.weight, *([head.bias] if bias else [])]
        grads.append([values.detach(), *(each.grad for each in operands)])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_only_what_wants_a_gradient_gets_one():
    hidden, head = _operands()
    head.weight.requires_grad_(False)
    fused_token_logps(hidden, head, torch.arange(N)).sum().backward()
    assert hidden.grad is not None and head.weight.grad is None and head.bias.grad is not None


def test_a_weight_with_a_graph_behind_it():
    """Such as that of a LoRA on the head."""
    hidden, head = _operands(bias=False)
    a, b = torch.randn(2, D, dtype=torch.float64, requires_grad=True), torch.ones(V, 2, dtype=torch.float64)
    found = []
    for function in (fused_token_logps, _dense):
        a.grad = None
        function(hidden.detach(), Head(head.weight.detach() + b @ a), torch.arange(N)).sum().backward()
        found.append(a.grad.clone())
    assert torch.allclose(*found, atol=1e-12)


def test_no_tokens():
    hidden, head = _operands()
    total = fused_token_logps(hidden[:0], head, torch.zeros(0, dtype=torch.int64)).sum()
    total.backward()
    assert total.item() == 0 and torch.equal(head.weight.grad, torch.zeros(V, D, dtype=torch.float64))
    assert torch.equal(hidden.grad, torch.zeros(N, D, dtype=torch.float64))


def test_bfloat16_operands_give_float32_values():
    hidden, head = _operands(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = fused_token_logps(hidden, head, torch.arange(N))
    values.sum().backward()
    assert values.dtype == torch.float32 and head.weight.grad.dtype == torch.bfloat16
    wide = Head(head.weight.detach().double(), head.bias.detach().double())
    assert torch.allclose(values.double(), _dense(hidden.detach().double(), wide, torch.arange(N)), atol=2e-2)


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_a_teachers_log_probabilities(kind):
    hidden, head = _operands()
    ids = torch.arange(N) % V
    signal = HiddenStates(hidden.detach(), head) if kind == "hidden" else Logits(head.logits(hidden).detach())
    found = signal_token_logps(signal, ids)
    assert torch.allclose(found, _dense(hidden, head, ids), atol=1e-12) and not found.requires_grad


def _row_terms(logps, teacher_logps, tokens):
    sums = sum_per_row(logps, tokens["row"], 3)
    first = tokens["first"].to(logps.dtype)
    seen = {} if teacher_logps is None else {"seen": teacher_logps}
    return {"squared": (sums**2)[tokens["row"]] * first, "token_weight": logps * 0 + 2, **seen}


def _terms(student, teacher, tokens):
    return {"nll": -tokens["token_weight"] * student.logps().gather(-1, tokens["labels"][:, None]).squeeze(-1)}


def test_losses_of_rows_and_of_tokens_add_up():
    """The square of a row's sum is no sum over tokens; entries `token_*` of the rows reach the tokens' function."""
    row = torch.tensor([0] * 4 + [1] * 8 + [2])
    first = torch.cat([torch.ones(1), (row[1:] != row[:-1]).float()])
    tokens = {"labels": torch.arange(N), "row": row, "first": first}
    weights = {"squared": 0.1, "nll": 0.7}
    hidden, head = _operands()
    teacher = HiddenStates(hidden.detach(), copy.deepcopy(head))
    total, terms = fused_row_terms(hidden, head, teacher, _terms, _row_terms, tokens, weights, chunk_bytes=5 * V * 8)
    total.backward()
    other, other_head = _operands()
    dense = _dense(other, other_head, tokens["labels"])
    expected = 0.1 * sum(dense[row == r].sum() ** 2 for r in range(3)) - 0.7 * 2 * dense.sum()
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(hidden.grad, other.grad, atol=1e-11)
    assert torch.allclose(head.weight.grad, other_head.weight.grad, atol=1e-11)
    assert terms.keys() == {"squared", "seen", "nll"}
    logits = other_head.logits(other.detach()).detach()
    again, plain = row_terms_of_logits(logits, teacher, _terms, _row_terms, tokens, weights)
    assert again.item() == pytest.approx(expected.item(), rel=1e-12)
    assert all(torch.allclose(plain[name], values) for name, values in terms.items())


def test_terms_of_tokens_cost_nothing_where_the_loss_has_none():
    def refused(*args):
        raise AssertionError("called")

    hidden, head = _operands()
    tokens = {"labels": torch.arange(N), "row": torch.zeros(N, dtype=torch.int64), "first": torch.ones(N)}
    teacher = HiddenStates(hidden.detach(), head)
    fused_row_terms(hidden, head, teacher, refused, _row_terms, tokens, {"squared": 1.0})[0].backward()
    with pytest.raises(AssertionError), torch.no_grad():
        fused_row_terms(hidden, head, teacher, refused, _row_terms, tokens, {})
