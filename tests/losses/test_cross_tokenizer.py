"""Losses between different tokenizers: against float64 references, at their limits, and under their inequalities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.losses import DIVERGENCES, resolve_divergence
from distill_trainers.losses.aligned import AlignedLoss
from distill_trainers.losses.cross_tokenizer import (
    NUM_BUCKETS,
    alm,
    bucket_logps,
    chunk_sums,
    chunks_of_ends,
    common_buckets,
    exact_overlap,
    next_byte,
    uld,
)
from distill_trainers.signals import Logits, TokenLogits
from distill_trainers.teachers.cache.kinds import next_bytes_of

SMOOTH = sorted(DIVERGENCES.keys() - {"logit_mse"})


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def binary_kl(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> torch.Tensor:
    p, q = (teacher / tau).exp(), (student / tau).exp()
    return tau * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


@pytest.mark.parametrize("tau", [1.0, 2.5, 100.0])
def test_alm_is_the_kl_of_the_event(tau):
    student, teacher = -logits(9).exp(), -logits(9, seed=1).exp()
    values = alm(student, teacher, tau)
    torch.testing.assert_close(values, binary_kl(student, teacher, tau))
    assert gradcheck(lambda s: alm(s, teacher, tau), (student.requires_grad_(),))


def test_alm_goes_to_its_limit_whose_gradient_is_known():
    student, teacher = (-logits(9).exp()).requires_grad_(), -logits(9, seed=1).exp()
    a, b = -teacher, -student
    limit = alm(student, teacher, math.inf)
    torch.testing.assert_close(limit, (b - a) + a * (a / b).log())
    torch.testing.assert_close(alm(student, teacher, 1e6), limit, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(limit.sum(), student)[0], a / b - 1)


@pytest.mark.parametrize("tau", [1.0, 100.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alm_of_equal_chunks_is_nothing_and_all_others_are_finite(tau, dtype):
    some = torch.tensor([0.0, -1e-9, -1e-4, -0.7, -30.0, -2000.0], dtype=dtype)
    same = some.clone().requires_grad_()
    values = alm(same, some, tau)
    assert (values == 0).all() and (torch.autograd.grad(values.sum(), same)[0].abs() < 1e-3).all()
    student = some.flip(0).clone().requires_grad_()
    values = alm(student, some, tau)
    slopes = torch.autograd.grad(values.sum(), student)[0]
    assert values.isfinite().all() and (values >= 0).all() and slopes.isfinite().all()
    assert (slopes[some.flip(0) < some] <= 0).all(), "what the teacher finds likelier must become likelier"


def test_alm_of_one_token_is_at_most_its_kl_and_equal_with_two_ids():
    for width in (2, 3, 50):
        student, teacher = logits(20, width).log_softmax(-1), logits(20, width, seed=1).log_softmax(-1)
        kl = (teacher.exp() * (teacher - student)).sum(-1)
        for token in range(width):
            values = alm(student[:, token], teacher[:, token])
            assert (values <= kl + 1e-12).all()
            if width == 2:
                torch.testing.assert_close(values, kl)


def test_sums_of_chunks_add_up_to_the_log_probability_of_the_text():
    token_logps = logits(200, 7).log_softmax(-1)[:, 0]
    ends = torch.tensor([3, 3, 10, 50, 51, 200])
    chunks = chunks_of_ends(ends)
    sums = chunk_sums(token_logps, chunks, len(ends))
    assert sums.sum().item() == pytest.approx(token_logps.sum().item(), abs=1e-9)
    assert sums[1] == 0 and sums[4] == token_logps[50]
    outside = chunks.masked_fill(chunks == 3, -1)
    assert chunk_sums(token_logps, outside, len(ends))[3] == 0
    assert chunk_sums(token_logps[:0], chunks[:0], 0).shape == (0,)


def some_buckets(width: int, count: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(count, (width,), generator=torch.Generator().manual_seed(seed))


def test_buckets_hold_the_mass_of_their_ids():
    scores, buckets = logits(6, 40), some_buckets(40, 9)
    logps = bucket_logps(scores, buckets)
    naive = scores.softmax(-1) @ F.one_hot(buckets, NUM_BUCKETS).double()
    torch.testing.assert_close(logps.exp()[:, :9], naive[:, :9])
    assert logps.exp().sum(-1).numpy() == pytest.approx(1.0)
    weights = logits(6, NUM_BUCKETS, seed=4)[:, :9]
    assert gradcheck(lambda z: (bucket_logps(z, buckets)[:, :9] * weights).sum(), (scores.requires_grad_(),))


def test_a_bucket_without_mass_gives_no_gradient():
    scores = logits(3, 10, dtype=torch.float32)
    scores[:, 4] = -math.inf
    scores.requires_grad_()
    logps = bucket_logps(scores, torch.arange(10))
    slopes = torch.autograd.grad(logps.sum(), scores)[0]
    assert logps.isfinite().all() and slopes.isfinite().all()
    torch.testing.assert_close(slopes, 9 * -scores.detach().softmax(-1) + (scores.detach() > -math.inf).float())


def test_many_rows_are_taken_block_by_block():
    scores, buckets = logits(700, 3000, dtype=torch.float32), some_buckets(3000, 258)
    whole = bucket_logps(scores, buckets)
    torch.testing.assert_close(whole[123:124], bucket_logps(scores[123:124], buckets))


@pytest.mark.parametrize("name", SMOOTH)
def test_next_bytes_are_no_further_apart_than_tokens(name):
    """Data processing; and two equal models are at 0, value and gradient."""
    scores, others, buckets = logits(30, 40).requires_grad_(), logits(30, 40, seed=1), some_buckets(40, 9)
    divergence = resolve_divergence(name)
    value = next_byte(name, bucket_logps(scores, buckets), bucket_logps(others, buckets))
    if name not in {"taid", "adaptive_kl"}:
        assert (value <= divergence(scores.log_softmax(-1), others.log_softmax(-1)) + 1e-9).all()
    same = next_byte(name, bucket_logps(scores, buckets), bucket_logps(scores.detach(), buckets))
    assert (same == 0).all()
    slope = torch.autograd.grad(same.sum(), scores)[0]
    assert slope.abs().max() < 1e-12


@pytest.mark.parametrize("name", SMOOTH)
def test_the_overlap_lies_between_nothing_and_the_whole_divergence(name):
    scores, others = logits(30, 40).requires_grad_(), logits(30, 40, seed=1)
    ids, order = torch.arange(0, 40, 2), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    student, teacher = scores.log_softmax(-1), others.log_softmax(-1)
    renamed = teacher[:, order.argsort()]  # the teacher's id of token v is order[v]
    value = exact_overlap(name, student, renamed, ids, order[ids])
    assert (value >= 0).all()
    divergence = resolve_divergence(name)
    if name not in {"taid", "adaptive_kl"}:
        assert (value <= divergence(student, teacher) + 1e-9).all()
        everything = exact_overlap(name, student, renamed, torch.arange(40), order)
        torch.testing.assert_close(everything, divergence(student, teacher), atol=1e-9, rtol=1e-6)
    assert exact_overlap(name, student, student, ids, ids).abs().max() == 0


def test_the_overlap_learns_through_its_tail():
    scores, others, ids = logits(4, 12).requires_grad_(), logits(4, 15, seed=1), torch.tensor([1, 5, 7])
    teacher = others.log_softmax(-1)

    def naive(z: torch.Tensor) -> torch.Tensor:
        p, q = teacher.exp()[:, ids], z.softmax(-1)[:, ids]
        rest = (1 - p.sum(-1), 1 - q.sum(-1))
        return (p * (p / q).log()).sum(-1) + rest[0] * (rest[0] / rest[1]).log()

    found = exact_overlap("forward_kl", scores.log_softmax(-1), teacher, ids, ids)
    torch.testing.assert_close(found, naive(scores))
    mine, reference = (torch.autograd.grad(v.sum(), scores)[0] for v in (found, naive(scores)))
    torch.testing.assert_close(mine, reference)


def test_uld_does_not_know_which_token_is_which():
    student = logits(8, 30).log_softmax(-1)
    shuffled = student[:, torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    assert uld(student, shuffled).abs().max() < 1e-12
    wider = F.pad(student, (0, 12), value=-math.inf)
    assert uld(student, wider).abs().max() < 1e-12
    other = logits(8, 44, seed=1).log_softmax(-1)
    naive = [
        sum(abs(a - b) for a, b in zip(sorted([*p, *[0.0] * 14]), sorted(q), strict=True))
        for p, q in zip(student.exp().tolist(), other.exp().tolist(), strict=True)
    ]
    assert uld(student, other).tolist() == pytest.approx(naive)
    assert gradcheck(lambda z: uld(z.log_softmax(-1), other), (logits(8, 30).requires_grad_(),))


def test_bytes_that_one_side_cannot_begin_are_one_bucket_for_both():
    student, teacher = torch.tensor([0, 1, 1, 256, 257]), torch.tensor([0, 2, 2, 256])
    ours, theirs = common_buckets(student, teacher)
    assert ours.tolist() == [0, 257, 257, 256, 257] and theirs.tolist() == [0, 257, 257, 256]
    values = next_byte("forward_kl", bucket_logps(logits(5, 5), ours), bucket_logps(logits(5, 4, seed=1), theirs))
    assert values.isfinite().all() and (values < 30).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
def test_a_teacher_that_was_summed_by_next_byte_teaches_the_same(divergence):
    """Bytes that only one side begins with, an id beyond the tokenizer's and the end of a text among them."""
    firsts = torch.tensor([0, 1, 1, 4, 256, 257]), torch.tensor([0, 2, 1, 2, 256, 7])
    loss = AlignedLoss({"next_byte": 1.0}, 1.0, *common_buckets(*firsts), *[torch.zeros(0, dtype=torch.long)] * 2)
    labels, shared = torch.tensor([0, 2, 4, 1, 5]), torch.tensor([1, 2, 0, 3, 4])
    tokens = {"labels": labels, "token_shared": shared, "token_comparable": shared, "token_alone": shared}
    scores, whole = logits(5, 6), TokenLogits(logits(5, 7, seed=1))
    kept = next_bytes_of(Logits(whole.logits), labels, F.pad(firsts[1], (0, 1), value=257))
    torch.testing.assert_close(kept.values, whole.logps().gather(-1, labels[:, None])[:, 0])
    found = []
    for teacher in (whole, kept):
        student = scores.clone().requires_grad_()
        values = loss.terms(TokenLogits(student), teacher, tokens, resolve_divergence(divergence))["next_byte"]
        found.append((values.detach(), *torch.autograd.grad(values.sum(), student)))
    torch.testing.assert_close(found[1], found[0])
    assert found[0][0][2] == 0 and found[0][0][0] > 0.01
    refused = AlignedLoss({"uld": 1.0}, *list(vars(loss).values())[1:])
    with pytest.raises(ConfigurationError, match="NextBytes for uld; expected its whole distribution"):
        refused.terms(TokenLogits(scores), kept, tokens, resolve_divergence(divergence))


def test_the_fused_head_gives_the_gradient_of_whole_logits():
    """`next_byte` on hidden states, chunk by chunk, beside the same on `[N, V]` logits."""
    from distill_trainers.losses import fused_linear_terms
    from distill_trainers.signals import Head

    hidden, weight = logits(50, 6).requires_grad_(), logits(40, 6, seed=1).requires_grad_()
    buckets = some_buckets(40, 9)
    target = bucket_logps(logits(50, 33, seed=2), some_buckets(33, 9, seed=5))

    def terms(student, teacher, tokens):
        return {"next_byte": next_byte("jsd", bucket_logps(student.logits, buckets), tokens["target"])}

    total, _ = fused_linear_terms(
        hidden, Head(weight), None, terms, {"target": target}, {"next_byte": 1.0}, chunk_bytes=8 * 40 * 7
    )
    whole = next_byte("jsd", bucket_logps(hidden @ weight.T, buckets), target).sum()
    torch.testing.assert_close(total, whole)
    for mine, reference in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(whole, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, reference)
