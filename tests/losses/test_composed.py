"""One distribution made of several, chunk by chunk within the loss: arithmetic of teachers, with its constants."""

import math

import pytest
import torch
import torch.nn.functional as F

from distill_trainers.exceptions import ConfigurationError
from distill_trainers.joining import Composition
from distill_trainers.losses import token_divergence
from distill_trainers.losses.fused_linear import fused_linear_terms
from distill_trainers.losses.fused_logps import signal_token_logps
from distill_trainers.signals import Composed, Head, HiddenStates, Logits, Routed, Sampled, TokenLogprobs, TopK, padded

N, V, D = 11, 17, 5
ROWS = 3  # tokens of a chunk


def states(seed, width=D, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, width, dtype=torch.float64, generator=generator)
    return HiddenStates(hidden, Head(scale * torch.randn(V, width, dtype=torch.float64, generator=generator)))


TEACHERS = (states(1), states(2, width=7), states(3, width=4))


def loss_and_gradient(teacher, divergence, tau=1.0):
    """By the package: the sum over tokens, and its gradient with respect to the student's hidden states and head."""
    student = states(9)
    hidden, weight = student.hidden.requires_grad_(), student.head.weight.requires_grad_()

    def terms(student_logits, told, tokens):
        return {"d": token_divergence(divergence, student_logits, told, tau)}

    total, values = fused_linear_terms(hidden, Head(weight), teacher, terms, {}, {"d": 1.0}, chunk_bytes=ROWS * V * 8)
    total.backward()
    return values["d"], hidden.grad, weight.grad


def dense(value_of):
    """By autograd: values `[N]` of the student's log-probabilities and those of the teachers, and the gradients."""
    student = states(9)
    hidden, weight = student.hidden.requires_grad_(), student.head.weight.requires_grad_()
    teachers = [F.log_softmax(t.head.logits(t.hidden), -1) for t in TEACHERS]
    values = value_of(F.log_softmax(hidden @ weight.T, -1), *teachers)
    values.sum().backward()
    return values.detach(), hidden.grad, weight.grad


def kl(a, b):
    return (a.exp() * (a - b)).sum(-1)


def entropy(logps):
    return -(logps.exp() * logps).sum(-1)


def g_opd(scale):
    """KL(q||p0) - scale E_q[log p/p0] + log sum p0^(1 - scale) p^scale (2602.12125)."""

    def value(q, p0, p, _):
        constant = torch.logsumexp((1 - scale) * p0 + scale * p, -1)
        return kl(q, p0) - scale * (q.exp() * (p - p0)).sum(-1) + constant

    return value


def reverse_kl_to_geometric(q, *p):
    """sum w_i KL(q||p_i) + log sum_v prod p_i^w_i."""
    powers = sum(w * logps for w, logps in zip(MIX, p, strict=True))
    return sum(w * kl(q, logps) for w, logps in zip(MIX, p, strict=True)) + torch.logsumexp(powers, -1)


def forward_kl_to_arithmetic(q, *p):
    """sum w_i KL(p_i||q) - H(mean) + sum w_i H(p_i)."""
    mean = sum(w * logps.exp() for w, logps in zip(MIX, p, strict=True)).log()
    each = sum(w * (kl(logps, q) + entropy(logps)) for w, logps in zip(MIX, p, strict=True))
    return each - entropy(mean)


def weak_to_strong(q, base, plus, minus):
    return kl(q, F.log_softmax(base + 0.7 * (plus - minus), -1))


MIX = (0.5, 0.3, 0.2)
IDENTITIES = {
    "geometric": (MIX, False, "reverse_kl", reverse_kl_to_geometric),
    "arithmetic": (MIX, True, "forward_kl", forward_kl_to_arithmetic),
    "extrapolated": ((-0.25, 1.25), False, "reverse_kl", g_opd(1.25)),
    "interpolated": ((0.4, 0.6), False, "reverse_kl", g_opd(0.6)),
    "weak to strong": ((1.0, 0.7, -0.7), False, "reverse_kl", weak_to_strong),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_composed_teacher_is_the_sum_of_its_parts_up_to_a_constant(name):
    """METHODS of several teachers: value, constant and gradient of each way to compose, in float64."""
    weights, arithmetic, divergence, expected = IDENTITIES[name]
    teacher = Composed(TEACHERS[: len(weights)], Composition(weights, arithmetic))
    found, reference = loss_and_gradient(teacher, divergence), dense(expected)
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_logits_are_composed_and_then_softened():
    teacher = Composed(TEACHERS, Composition(MIX, arithmetic=True))

    def value(q, *p):
        mean = sum(w * logps.exp() for w, logps in zip(MIX, p, strict=True)).log()
        return kl(F.log_softmax(mean / 2, -1), F.log_softmax(q / 2, -1))

    for ours, theirs in zip(loss_and_gradient(teacher, "forward_kl", 2.0), dense(value), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_it_is_never_held_whole(monkeypatch):
    """Neither in the loss of its distributions nor in the log-probabilities of single tokens."""
    seen, of = [], Composition.of
    monkeypatch.setattr(Composition, "of", lambda self, logits, out: seen.append(len(out)) or of(self, logits, out))
    teacher = Composed(TEACHERS, Composition(MIX))
    loss_and_gradient(teacher, "reverse_kl")
    assert sum(seen) == N and max(seen) <= ROWS
    seen.clear()
    labels = torch.arange(N) % V
    logps = signal_token_logps(teacher, labels, chunk_bytes=ROWS * V * 4)
    assert sum(seen) == N and max(seen) <= ROWS
    powers = sum(w * F.log_softmax(t.head.logits(t.hidden), -1) for w, t in zip(MIX, TEACHERS, strict=True))
    expected = F.log_softmax(powers, -1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("weights", "arithmetic"), [((0.5, 0.5), False), ((0.5, 0.5), True), ((-0.5, 1.5), False), ((1.5, -0.5), False)]
)
def test_an_excluded_id_stays_finite_or_excluded_and_a_nan_is_seen(weights, arithmetic):
    inf, nan = math.inf, math.nan
    first, second = torch.tensor([[0.0, 1.0, -inf, -inf, nan]]), torch.tensor([[0.5, -inf, 2.0, -inf, 1.0]])
    found = Composition(weights, arithmetic).of([first[:, :4], second[:, :4]], torch.empty(1, 4))[0].tolist()
    assert math.isfinite(found[0]) and found[3] == -inf
    if arithmetic:  # one of them gives it mass
        assert all(map(math.isfinite, found[:3]))
    else:
        assert found[1:] == [-inf] * 3
    assert Composition(weights, arithmetic).of([first, second], torch.empty(1, 5))[0].isnan().any()


# ---- Each token of one teacher --------------------------------------------------------------------------------------

OWNERS = torch.tensor([1, 0, 0, 2, 1, 1, 0, 2, 2, 2, 0])


def part(signal, k):
    rows = OWNERS == k
    return type(signal)(*(v[rows] if isinstance(v, torch.Tensor) else v for v in vars(signal).values()))


def kinds():
    logps = [F.log_softmax(t.head.logits(t.hidden), -1) for t in TEACHERS]
    top = [values.topk(4) for values in logps]
    rest = [torch.log1p(-best.values.exp().sum(-1)) for best in top]
    drawn = [[3, 5, 4][k] for k in range(3)]  # as many different ids among the draws
    return {
        "hidden": TEACHERS,
        "logits": tuple(Logits(t.head.logits(t.hidden)) for t in TEACHERS),
        "topk": tuple(TopK(best.indices, best.values, tail) for best, tail in zip(top, rest, strict=True)),
        "sampled": tuple(
            Sampled(values.topk(n).indices, values.topk(n).values, torch.full((N, n), 1 / n, dtype=torch.float64))
            for values, n in zip(logps, drawn, strict=True)
        ),
        "token_logprobs": tuple(TokenLogprobs(values[:, 3]) for values in logps),
    }


@pytest.mark.parametrize("kind", kinds())
def test_routed_answers_lie_in_the_order_of_the_tokens(kind):
    whole = kinds()[kind]
    signal = Routed(tuple(part(whole[k], k) for k in range(3)), OWNERS)
    for rows in (slice(None), slice(0, 4), slice(4, 6), slice(6, 40), slice(3, 3)):
        found = signal.chunk(rows)
        assert type(found) is type(whole[0].chunk(rows))
        for place, k in enumerate(OWNERS[rows].tolist()):
            number = list(range(N))[rows][place]
            expected = whole[k].chunk(slice(number, number + 1))
            for name, value in vars(expected).items():
                if isinstance(value, torch.Tensor):
                    own = vars(found)[name][place : place + 1]
                    rest = own[..., value.shape[-1] :] if value.ndim > 1 else own[:0]
                    assert not rest.any()
                    torch.testing.assert_close(own[..., : value.shape[-1]] if value.ndim > 1 else own, value)


def test_a_loss_over_routed_tokens_is_the_sum_of_the_teachers_own():
    """One sum over all tokens, whoever taught them: value and gradient."""
    signal = Routed(tuple(part(TEACHERS[k], k) for k in range(3)), OWNERS)

    def value(q, *p):
        return sum((OWNERS == k) * kl(logps, q) for k, logps in enumerate(p))

    for ours, theirs in zip(loss_and_gradient(signal, "forward_kl"), dense(value), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    inner = Composed(tuple(part(t, 0) for t in TEACHERS), Composition(MIX))
    nested = Routed((inner, part(TEACHERS[1], 1), part(TEACHERS[2], 2)), OWNERS)
    values, *_ = loss_and_gradient(nested, "reverse_kl")
    expected, *_ = loss_and_gradient(Composed(TEACHERS, Composition(MIX)), "reverse_kl")
    torch.testing.assert_close(values[OWNERS == 0], expected[OWNERS == 0])


def test_signals_of_several_grow_by_tokens_of_which_nothing_is_said():
    routed = Routed((None, part(TEACHERS[1], 1), part(TEACHERS[2], 2)), OWNERS[OWNERS > 0])
    for signal in (routed, Composed(TEACHERS, Composition(MIX))):
        longer = padded(signal, len(signal) + 3)
        assert len(longer) == len(signal) + 3
        everything = slice(0, len(signal))
        torch.testing.assert_close(longer.chunk(everything).logits, signal.chunk(everything).logits)


def test_what_does_not_go_together_is_refused():
    topk = kinds()["topk"]
    with pytest.raises(ConfigurationError, match="expected one kind of answers"):
        Routed((part(TEACHERS[0], 0), part(topk[1], 1), part(TEACHERS[2], 2)), OWNERS).chunk(slice(None))
    narrow = TopK(*(v[:, :2] if v.ndim > 1 else v for v in vars(part(topk[1], 1)).values()))
    with pytest.raises(ConfigurationError, match="the same top k"):
        Routed((part(topk[0], 0), narrow, part(topk[2], 2)), OWNERS).chunk(slice(None))
    with pytest.raises(ConfigurationError, match=r"speak of \[11, 3, 4\] tokens, expected \[4, 3, 4\]"):
        Routed((TEACHERS[0], part(TEACHERS[1], 1), part(TEACHERS[2], 2)), OWNERS)
    with pytest.raises(ConfigurationError, match="Got TokenLogits, TokenTopK of teachers that are composed"):
        Composed((TEACHERS[0], topk[1]), Composition((0.5, 0.5))).chunk(slice(None))
