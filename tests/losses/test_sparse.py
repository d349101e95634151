"""Top-k signals with their tail, and sampled ones, against the whole distributions in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.losses import (
    DIVERGENCES,
    check_sparse,
    forward_kl,
    fused_linear_terms,
    resolve_divergence,
    token_divergence,
    token_logps,
)
from distill_trainers.signals import (
    SMALLEST_TAIL,
    Head,
    HiddenStates,
    Sampled,
    TokenLogits,
    TokenSampled,
    TokenTopK,
    TopK,
)

N, D, V = 7, 5, 12
BUCKETED = [name for name in DIVERGENCES if name != "logit_mse"]
# Those that never grow when ids are put together; adaptive_kl and taid change their weight and target with the ids.
F_DIVERGENCES = [name for name in BUCKETED if name not in ("adaptive_kl", "taid")]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(tokens: int = N, ids: int = V, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    return (spread * rand(tokens, ids, seed=1)).requires_grad_(), spread * rand(tokens, ids, seed=2)


def whole(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    return DIVERGENCES[name](F.log_softmax(student, -1), F.log_softmax(teacher, -1))


def by_top_k(name: str, student: Tensor, teacher: Tensor, k: int) -> Tensor:
    return token_divergence(name, TokenLogits(student), TokenLogits(teacher).top_k(k))


def gradient(values: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(values @ torch.linspace(0.5, 2, len(values), dtype=values.dtype), of)


# Given tokens
def test_token_logps_equal_a_dense_softmax():
    logits, _ = pair()
    ids = torch.arange(N) % V
    found = token_logps(TokenLogits(logits), ids)
    expected = F.log_softmax(logits, -1)[torch.arange(N), ids]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, logits), gradient(expected, logits))
    several = torch.tensor([[0, 3, 3]]).expand(N, 3)  # an id may repeat
    found, expected = token_logps(TokenLogits(logits), several), F.log_softmax(logits, -1).gather(-1, several)
    torch.testing.assert_close(gradient(found.sum(-1), logits), gradient(expected.sum(-1), logits))
    assert torch.autograd.gradcheck(lambda z: token_logps(TokenLogits(z), several), logits)
    assert token_logps(TokenLogits(logits[:0]), ids[:0]).shape == (0,)


# Top k
def test_top_k_of_logits():
    _, teacher = pair()
    p = teacher.softmax(-1)
    signal = TokenLogits(teacher).top_k(3)
    assert signal.ids.tolist() == p.sort(descending=True).indices[:, :3].tolist()
    torch.testing.assert_close(signal.logps.exp(), p.gather(-1, signal.ids))
    torch.testing.assert_close(signal.tail_logps.exp(), 1 - p.gather(-1, signal.ids).sum(-1))
    everything = TokenLogits(teacher).top_k(V + 5)
    assert everything.ids.shape == (N, V) and (everything.tail_logps == -math.inf).all()
    with pytest.raises(ConfigurationError, match="k=0"):
        TokenLogits(teacher).top_k(0)


@pytest.mark.parametrize("name", BUCKETED)
@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_value_and_gradient_are_those_of_the_buckets_by_hand(name, k):
    student, teacher = pair()
    ids = teacher.argsort(descending=True)[:, :k]

    def buckets(logits: Tensor) -> Tensor:
        probs = logits.softmax(-1)
        kept = probs.gather(-1, ids)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log()

    found, expected = by_top_k(name, student, teacher, k), DIVERGENCES[name](buckets(student), buckets(teacher))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(found, student), gradient(expected, student), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", BUCKETED)
def test_all_ids_give_the_whole_divergence(name):
    student, teacher = pair()
    found, expected = by_top_k(name, student, teacher, V), whole(name, student, teacher)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, student), gradient(expected, student))


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_lies_between_zero_and_the_whole_and_grows_with_k(name):
    student, teacher = pair(tokens=40)
    values = torch.stack([by_top_k(name, student, teacher, k) for k in range(1, V + 1)]).detach()
    assert (values >= 0).all()
    assert (values.diff(dim=0) >= -1e-12).all()
    assert (values <= whole(name, student, teacher) + 1e-12).all()
    assert values[-1].mean() > 1.05 * values[0].mean()


@pytest.mark.parametrize("name", BUCKETED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_at_equality(name, dtype):
    logits = (3 * rand(4, 3000, seed=3)).to(dtype).requires_grad_()
    value = by_top_k(name, logits, logits.detach(), 20)
    near = 40 * torch.finfo(dtype).eps  # rounding gave 4
    assert (value >= 0).all() and value.max() < near
    if name not in ("total_variation", "lk"):  # whose gradient jumps there
        assert gradient(value, logits)[0].abs().max() < near


def test_without_the_tail_the_minimum_would_be_elsewhere():
    """The fault that the tail mends: normalised among the top k, the KL is no lower bound and falls below 0."""
    student, teacher = pair(tokens=200)
    signal = TokenLogits(teacher).top_k(3)
    p = F.softmax(signal.logps, -1)
    renormalised = (p * (p.log() - F.log_softmax(student, -1).gather(-1, signal.ids))).sum(-1)
    assert (renormalised > whole("forward_kl", student, teacher) + 0.1).any()
    peak = teacher.scatter(-1, signal.ids, teacher.gather(-1, signal.ids) + 50)  # no mass but on the top k
    at_teacher, at_peak = (token_divergence("forward_kl", TokenLogits(z), signal).sum() for z in (teacher, peak))
    assert at_teacher < 1e-12 and at_peak > 1


def test_a_small_tail_keeps_its_digits_in_float32():
    """1 minus the kept mass would be rounding alone."""
    logits = torch.zeros(1, 50)
    logits[:, 0] = 20.0
    student = (logits + torch.linspace(0, 1, 50)).requires_grad_()
    signal = TokenLogits(logits).top_k(1)
    assert signal.tail_logps.exp().item() == pytest.approx(49 * math.exp(-20), rel=1e-4)

    def tail(student_logps, teacher_logps):
        return student_logps[:, -1]

    found = token_divergence(tail, TokenLogits(student), signal)
    expected = (student.double().exp()[:, 1:].sum() / student.double().exp().sum()).log()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(found, student), torch.autograd.grad(expected, student), rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("gap", [30.0, 59.0, 61.0, 120.0])
def test_a_tail_too_small_for_its_inverse_has_a_finite_gradient(gap):
    """1/tail overflows in float32 from e^88 on, and 0 times infinity is no number."""
    teacher = TokenLogits(rand(3, V, seed=2)).top_k(2)
    base = rand(3, V, seed=1)
    base = base.scatter_add(-1, teacher.ids, torch.full((3, 2), gap, dtype=base.dtype))

    def gradient(dtype: torch.dtype) -> Tensor:
        logits = base.detach().to(dtype, copy=True).requires_grad_()
        token_divergence("forward_kl", TokenLogits(logits), teacher).sum().backward()
        assert logits.grad is not None
        return logits.grad

    exact = gradient(torch.float64)
    logits = base.clone().requires_grad_()
    others = torch.logsumexp(logits.scatter(-1, teacher.ids, -math.inf), -1, keepdim=True)
    buckets = F.log_softmax(torch.cat([logits.gather(-1, teacher.ids), others], -1), -1)
    forward_kl(buckets, teacher.buckets()).sum().backward()
    assert torch.allclose(exact, logits.grad, rtol=1e-9, atol=1e-12)
    assert torch.allclose(gradient(torch.float32).double(), exact, rtol=1e-4, atol=1e-5)


def test_stored_probabilities_that_were_rounded_are_normalised_anew():
    student, teacher = pair()
    exact = TokenLogits(teacher).top_k(6)
    stored = TopK(exact.ids.to(torch.int32), exact.logps.half(), exact.tail_logps.half())
    chunk = stored.chunk(slice(2, 5))
    assert len(stored) == N and chunk.ids.dtype == torch.int64 and chunk.logps.dtype == torch.float32
    torch.testing.assert_close(chunk.buckets().exp().sum(-1), torch.ones(3))
    found = token_divergence("forward_kl", TokenLogits(student[2:5].float()), chunk)
    torch.testing.assert_close(found.double(), by_top_k("forward_kl", student, teacher, 6)[2:5], rtol=0.01, atol=1e-3)
    assert (token_divergence("forward_kl", TokenLogits(teacher[2:5].float()), chunk) >= 0).all()


SURE = {  # what a sure teacher's server tells of three of twelve ids, as log-probabilities
    "one id has it all": [0.0, -40.0, -41.0],
    "rounds to 1": [-3e-8, -19.0, -20.0],
    "a little above 1": [math.log1p(2e-4), -12.0, -13.0],
    "an id that it cannot say": [0.0, -math.inf, -math.inf],
}


@pytest.mark.parametrize(
    ("told", "name"),
    [
        (told, name)
        for told in SURE
        for name in ("forward_kl", "jsd", "skew_reverse_kl", "reverse_kl", "adaptive_kl")
        if "cannot" not in told or name not in ("reverse_kl", "adaptive_kl")  # infinite, as for whole distributions
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_teacher_whose_ids_have_all_mass_keeps_the_least_tail(told, dtype, name):
    logps = torch.tensor([SURE[told]]).to(dtype)
    signal = TopK(torch.tensor([[3, 0, 7]], dtype=torch.int32), logps, torch.tensor([-math.inf]))
    student = rand(1, V, seed=1).float().requires_grad_()
    value = token_divergence(name, TokenLogits(student), signal.chunk(slice(None)))
    (found,) = torch.autograd.grad(value.sum(), student)

    double = student.detach().double().requires_grad_()
    q, told_probs = double.softmax(-1)[:, [3, 0, 7]], logps.double().exp()
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    p = torch.cat([told_probs, torch.tensor([[2.0**-24]], dtype=torch.float64)], -1)
    expected = DIVERGENCES[name](q.log(), (p / p.sum()).log())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.double(), torch.autograd.grad(expected.sum(), double)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", [-math.inf, SMALLEST_TAIL, -3.0])
def test_all_ids_leave_no_tail_whatever_is_told_of_it(tail):
    student, teacher = pair()
    told = TokenTopK(torch.arange(V).expand(N, V), teacher.log_softmax(-1), torch.full((N,), tail))
    for name in BUCKETED:
        found = token_divergence(name, TokenLogits(student), told)
        torch.testing.assert_close(found, whole(name, student, teacher))


# Sampled
def every_draw(p: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """All sequences of draws `[S, draws]` from one distribution `[V]`, and the probability of each."""
    sequences = torch.tensor(list(itertools.product(range(len(p)), repeat=draws)))
    return sequences, p[sequences].prod(-1)


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_value_and_gradient_are_unbiased_over_all_draws(draws):
    z_q, z_p = rand(3, seed=1).requires_grad_(), rand(3, seed=2)
    p_logps = F.log_softmax(z_p, -1)
    sequences, probability = every_draw(p_logps.exp(), draws)
    assert probability.sum().item() == pytest.approx(1)
    signal = TokenSampled.from_draws(sequences, p_logps.expand(len(sequences), 3))
    values = token_divergence("forward_kl", TokenLogits(z_q.expand(len(sequences), 3)), signal)
    expected = forward_kl(F.log_softmax(z_q, -1), p_logps)
    torch.testing.assert_close(probability @ values, expected, rtol=1e-12, atol=1e-14)
    (found,) = torch.autograd.grad(probability @ values, z_q)
    torch.testing.assert_close(found, (z_q.softmax(-1) - p_logps.exp()).detach(), rtol=1e-12, atol=1e-14)
    assert values.std() > 0.02  # each draw by itself is another number


def test_the_gradient_of_one_draw_is_the_student_minus_the_counts():
    student, teacher = pair()
    draws = torch.randint(V, (N, 9), generator=torch.Generator().manual_seed(0))
    signal = TokenSampled.from_draws(draws, F.log_softmax(teacher, -1))
    counts = F.one_hot(draws, V).sum(1)
    values = token_divergence("forward_kl", TokenLogits(student), signal)
    (found,) = torch.autograd.grad(values.sum(), student)
    torch.testing.assert_close(found, student.detach().softmax(-1) - counts.double() / 9)
    gap = F.log_softmax(teacher, -1) - F.log_softmax(student, -1)
    torch.testing.assert_close(values, (counts.double() / 9 * gap).sum(-1))


def test_draws_are_counted_and_padded():
    logps = F.log_softmax(rand(3, 4), -1)
    signal = TokenSampled.from_draws(torch.tensor([[2, 2, 2], [3, 0, 3], [1, 3, 0]]), logps)
    assert signal.ids.tolist() == [[2, 0, 0], [0, 3, 0], [0, 1, 3]]
    torch.testing.assert_close(signal.weights * 3, torch.tensor([[3.0, 0, 0], [1, 2, 0], [1, 1, 1]]).double())
    torch.testing.assert_close(signal.logps, logps.gather(-1, signal.ids))
    assert TokenSampled.from_draws(torch.zeros(0, 5, dtype=torch.long), logps[:0]).weights.shape[0] == 0


def test_sampling_follows_the_teacher():
    teacher = rand(1, 5, seed=4).expand(400, 5)
    signal = TokenLogits(teacher).sample(50, torch.Generator().manual_seed(0))
    torch.testing.assert_close(signal.weights.sum(-1), torch.ones(400).double())
    shares = torch.zeros(400, 5).double().scatter_add_(-1, signal.ids, signal.weights).mean(0)
    assert (shares - teacher[0].softmax(-1)).abs().max() < 5 * 0.5 / math.sqrt(400 * 50)  # 5 standard errors
    again = TokenLogits(teacher).sample(50, torch.Generator().manual_seed(0))
    assert torch.equal(again.ids, signal.ids)
    with pytest.raises(ConfigurationError, match="draws=0"):
        TokenLogits(teacher).sample(0)


def test_sampled_is_zero_at_equality_and_may_be_negative():
    student, teacher = pair(tokens=200)
    signal = TokenLogits(teacher).sample(3, torch.Generator().manual_seed(0))
    assert token_divergence("forward_kl", TokenLogits(teacher), signal).abs().max() < 1e-13
    assert (token_divergence("forward_kl", TokenLogits(student), signal) < 0).any()


# Through the fused head
HEADS = {
    "plain": {},
    "soft cap": {"soft_cap": 2.0},
    "scale": {"scale": 0.3},
    "bias": {"bias": True},
    "padded": {"vocab_size": V - 3},
    "everything": {"soft_cap": 3.0, "scale": 0.5, "bias": True, "vocab_size": V - 3},
}


def stored(kind: str, teacher: Tensor) -> TopK | Sampled:
    if kind == "top k":
        token = TokenLogits(teacher).top_k(4)
        return TopK(token.ids.to(torch.int32), token.logps, token.tail_logps)
    sampled = TokenLogits(teacher).sample(6, torch.Generator().manual_seed(3))
    return Sampled(sampled.ids.to(torch.int32), sampled.logps, sampled.weights)


@pytest.mark.parametrize("kind", ["top k", "sampled"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_equals_dense_for_every_head(kind, head, dtype):
    options = dict(HEADS[head])
    hidden, weight = rand(N, D, seed=5, dtype=dtype).requires_grad_(), rand(V, D, seed=6, dtype=dtype).requires_grad_()
    bias = rand(V, seed=7, dtype=dtype).requires_grad_() if options.pop("bias", False) else None
    ids = options.get("vocab_size", V)
    signal = stored(kind, 2 * rand(N, ids, seed=8))
    names = ["forward_kl", "jsd"] if kind == "top k" else ["forward_kl"]

    def terms(student, teacher, tokens):
        assert isinstance(teacher, TokenTopK if kind == "top k" else TokenSampled)
        values = {name: token_divergence(name, student, teacher) for name in names}
        return {**values, "nll": -token_logps(student, tokens["labels"])}

    weights = {name: 1.0 + i for i, name in enumerate(names)} | {"nll": 0.5}
    tokens = {"labels": torch.arange(N) % ids}
    fused_head = Head(weight, bias, **options)
    total, found = fused_linear_terms(hidden, fused_head, signal, terms, tokens, weights, chunk_bytes=2 * ids * 8)

    learned = [each for each in (hidden, weight, bias) if each is not None]
    exact = [each.detach().double().requires_grad_() for each in learned]
    dense_head = Head(exact[1], exact[2] if bias is not None else None, **options)
    expected = terms(TokenLogits(dense_head.logits(exact[0])), signal.chunk(slice(None)), tokens)
    dense = sum(weights[name] * values.sum() for name, values in expected.items())
    loose = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    torch.testing.assert_close(total.double(), dense, rtol=loose, atol=loose)
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values.detach(), rtol=10 * loose, atol=10 * loose)
    for mine, reference in zip(torch.autograd.grad(total, learned), torch.autograd.grad(dense, exact), strict=True):
        near = max(10 * loose, 4 * torch.finfo(dtype).eps)
        assert mine.dtype == dtype
        assert (mine.double() - reference).norm() <= near * reference.norm()
    with torch.no_grad():
        silent, _ = fused_linear_terms(hidden, fused_head, signal, terms, tokens, weights)
    torch.testing.assert_close(silent, total.detach(), rtol=loose, atol=loose)


@pytest.mark.parametrize("kind", ["top k", "sampled"])
def test_no_tokens_still_take_part_in_backward(kind):
    hidden, weight = rand(0, D).requires_grad_(), rand(V, D).requires_grad_()
    full = stored(kind, rand(N, V))
    empty = type(full)(*(getattr(full, name)[:0] for name in full.__dataclass_fields__))

    def terms(student, teacher, tokens):
        return {"kl": token_divergence("forward_kl", student, teacher)}

    total, found = fused_linear_terms(hidden, Head(weight), empty, terms, {}, {"kl": 1.0})
    total.backward()
    assert total.item() == 0 and found["kl"].shape == (0,) and not weight.grad.any()


def test_a_signal_of_the_whole_vocabulary_gives_what_hidden_states_give():
    hidden, weight, teacher_hidden, teacher_weight = rand(N, D), rand(V, D, seed=1), rand(N, 4), rand(V, 4, seed=2)
    whole_signal = HiddenStates(teacher_hidden, Head(teacher_weight))
    token = TokenLogits(teacher_hidden @ teacher_weight.T).top_k(V)

    def terms(student, teacher, tokens):
        return {"jsd": token_divergence("jsd", student, teacher)}

    totals = [
        fused_linear_terms(hidden, Head(weight), signal, terms, {}, {"jsd": 1.0})[0]
        for signal in (whole_signal, TopK(token.ids, token.logps, token.tail_logps))
    ]
    torch.testing.assert_close(*totals)


# What sparse signals cannot give
def test_what_a_sparse_signal_cannot_give_is_refused():
    student, teacher = pair()
    top_k, sampled = TokenLogits(teacher).top_k(3), TokenLogits(teacher).sample(3)
    for signal in (top_k, sampled):
        with pytest.raises(ConfigurationError, match="temperature of the loss is 2.0"):
            token_divergence("forward_kl", TokenLogits(student), signal, 2.0)
        with pytest.raises(ConfigurationError, match="logit_mse"):
            token_divergence("logit_mse", TokenLogits(student), signal)
    for kind in (Sampled, TokenSampled):
        with pytest.raises(ConfigurationError, match="forward_kl only, got jsd"):
            check_sparse(resolve_divergence("jsd", beta=0.2), kind)
        check_sparse(resolve_divergence("forward_kl"), kind)
    for name in BUCKETED:
        check_sparse(name, TopK)
    with pytest.raises(ConfigurationError, match="every id.*Use one of adaptive_kl"):
        check_sparse("logit_mse", TopK)
