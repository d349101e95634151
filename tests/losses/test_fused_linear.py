"""The fused loss equals the dense one, in value and every gradient, and never holds `[N, V]`."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill_trainers.exceptions import ConfigurationError, VocabularyError
from distill_trainers.losses import DIVERGENCES, fused_linear_divergence, fused_linear_terms, reverse_kl
from distill_trainers.losses.reduction import token_mean
from distill_trainers.signals import Head, HiddenStates, Logits

N, DS, DT, V = 11, 6, 9, 13


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(
    dtype: torch.dtype = torch.float64, tokens: int = N, ids: int = V
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student = (
        rand(tokens, DS, seed=1, dtype=dtype).requires_grad_(),
        rand(ids, DS, seed=2, dtype=dtype).requires_grad_(),
    )
    return *student, rand(tokens, DT, seed=3, dtype=dtype), rand(ids, DT, seed=4, dtype=dtype)


def terms_fn(student, teacher, tokens):
    logps = student.logps()
    nll = -logps.gather(-1, tokens["targets"][:, None]).squeeze(-1)
    return {
        "kl": reverse_kl(logps, teacher.logps()),
        "nll": tokens["scale"] * nll,
        "hits": (logps > -1).sum(-1).float(),
    }


def tokens_of(tokens: int = N) -> dict[str, Tensor]:
    return {"targets": torch.arange(tokens) % V, "scale": rand(tokens, seed=9).abs()}


def rows(n: int, ids: int = V, itemsize: int = 8) -> int:
    """Bytes of a chunk of `n` tokens."""
    return n * ids * itemsize


def dense_logits(hidden, weight, bias=None, scale=1.0, soft_cap=None, vocab_size=None):
    logits = (F.linear(hidden, weight, bias) * scale)[:, :vocab_size]
    return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap


# Against dense autograd
@pytest.mark.parametrize("chunk_bytes", [1, rows(1), rows(2), rows(3) + 7, rows(N - 1), rows(N), rows(N + 1), 2**26])
def test_terms_equal_dense_autograd_for_any_chunk_size(chunk_bytes):
    hidden, weight, teacher_hidden, teacher_weight = operands()
    teacher = HiddenStates(teacher_hidden, Head(teacher_weight))
    weights = {"kl": 1.5, "nll": -0.5}
    total, terms = fused_linear_terms(
        hidden, Head(weight), teacher, terms_fn, tokens_of(), weights, chunk_bytes=chunk_bytes
    )
    student_logps, teacher_logps = (
        (hidden @ weight.T).log_softmax(-1),
        (teacher_hidden @ teacher_weight.T).log_softmax(-1),
    )
    kl = (student_logps.exp() * (student_logps - teacher_logps)).sum(-1)
    nll = F.cross_entropy(hidden @ weight.T, tokens_of()["targets"], reduction="none") * tokens_of()["scale"]
    expected = 1.5 * kl.sum() - 0.5 * nll.sum()

    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(terms["kl"], kl.detach())
    torch.testing.assert_close(terms["nll"], nll.detach())
    assert terms["hits"].shape == (N,) and not any(values.requires_grad for values in terms.values())
    upstream = 0.37
    for fused, dense in zip(
        torch.autograd.grad(total * upstream, (hidden, weight)),
        torch.autograd.grad(expected * upstream, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(fused, dense)


HEADS = {
    "plain": {},
    "scale": {"student_scale": 0.3, "teacher_scale": 1.7},
    "soft cap": {"student_soft_cap": 2.0, "teacher_soft_cap": 5.0},
    "bias": {"bias": True},
    "everything": {"student_scale": 0.5, "student_soft_cap": 3.0, "bias": True, "vocab_size": 10, "teacher_scale": 2.0},
    "padded": {"vocab_size": 10},
    "vocab_size beyond the head": {"vocab_size": 99},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("divergence", "params"), [("jsd", {"beta": 0.2}), ("reverse_kl", {}), ("logit_mse", {})])
@pytest.mark.parametrize(("temperature", "tau_squared"), [(1.0, False), (2.0, True)])
def test_divergence_equals_dense_autograd(head, divergence, params, temperature, tau_squared):
    options = dict(HEADS[head])
    hidden, weight, teacher_hidden, teacher_weight = operands()
    teacher_weight = torch.cat([teacher_weight, rand(2, DT)]) if "vocab_size" in options else teacher_weight
    options["vocab_size"] = min(options.get("vocab_size", V), V)
    biases = {}
    if options.pop("bias", False):
        biases = {"student": rand(V, seed=5).requires_grad_(), "teacher": rand(len(teacher_weight), seed=6)}
    token_weight = rand(N, seed=7)
    if head == "vocab_size beyond the head":
        teacher_weight, vocab_size = teacher_weight[:V], 99
    else:
        vocab_size = options["vocab_size"]

    fused = fused_linear_divergence(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        divergence=divergence,
        temperature=temperature,
        tau_squared=tau_squared,
        token_weight=token_weight,
        student_bias=biases.get("student"),
        teacher_bias=biases.get("teacher"),
        **{**options, "vocab_size": vocab_size},
        **params,
        chunk_bytes=rows(4),
    )
    logps = []
    for side, operand in (("student", (hidden, weight)), ("teacher", (teacher_hidden, teacher_weight))):
        logits = dense_logits(
            *operand,
            bias=biases.get(side),
            scale=options.get(f"{side}_scale", 1.0),
            soft_cap=options.get(f"{side}_soft_cap"),
            vocab_size=options["vocab_size"],
        )
        logps.append(F.log_softmax(logits / temperature, -1))
    dense = (token_weight * DIVERGENCES[divergence](*logps, **params)).sum() * (temperature**2 if tau_squared else 1)
    torch.testing.assert_close(fused, dense)
    learned = [hidden, weight, *([biases["student"]] if biases else [])]
    gradients = torch.autograd.grad(fused, learned)
    for gradient, expected in zip(gradients, torch.autograd.grad(dense, learned), strict=True):
        torch.testing.assert_close(gradient, expected)
    if options["vocab_size"] < V:
        assert all((each[options["vocab_size"] :] == 0).all() for each in gradients[1:])


@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_every_divergence_runs_fused(divergence):
    hidden, weight, teacher_hidden, teacher_weight = operands()
    fused = fused_linear_divergence(
        hidden, weight, teacher_hidden, teacher_weight, divergence=divergence, chunk_bytes=rows(3)
    )
    logps = (hidden @ weight.T).log_softmax(-1), (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    dense = DIVERGENCES[divergence](*logps).sum()
    torch.testing.assert_close(fused, dense)
    torch.testing.assert_close(torch.autograd.grad(fused, weight), torch.autograd.grad(dense, weight))


def test_gradcheck():
    hidden, weight, teacher_hidden, teacher_weight = operands(tokens=3, ids=5)
    bias = rand(5, seed=5).requires_grad_()

    def loss(hidden, weight, bias):
        return fused_linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, student_bias=bias, student_soft_cap=2.0, chunk_bytes=1
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_teacher_logits_and_teacher_hidden_states_agree():
    hidden, weight, teacher_hidden, teacher_weight = operands()
    totals = [
        fused_linear_terms(hidden, Head(weight), teacher, terms_fn, tokens_of(), {"kl": 1.0}, chunk_bytes=rows(2))[0]
        for teacher in (HiddenStates(teacher_hidden, Head(teacher_weight)), Logits(teacher_hidden @ teacher_weight.T))
    ]
    torch.testing.assert_close(*totals)


def test_no_teacher_is_plain_cross_entropy():
    hidden, weight, *_ = operands()
    targets = tokens_of()["targets"]

    def nll(student, teacher, tokens):
        assert teacher is None
        return {"nll": -student.logps().gather(-1, tokens["targets"][:, None]).squeeze(-1)}

    total, _ = fused_linear_terms(hidden, Head(weight), None, nll, {"targets": targets}, {"nll": 1.0}, chunk_bytes=1)
    torch.testing.assert_close(total, F.cross_entropy(hidden @ weight.T, targets, reduction="sum"))


# Who gets a gradient
def small_loss(hidden, weight, bias=None, tokens=N, dtype=torch.float64, **options):
    *_, teacher_hidden, teacher_weight = operands(dtype, tokens, len(weight))
    return fused_linear_divergence(
        hidden, weight, teacher_hidden, teacher_weight, student_bias=bias, chunk_bytes=rows(3), **options
    )


def dense_loss(hidden, weight):
    *_, teacher_hidden, teacher_weight = operands()
    logps = (hidden @ weight.T).log_softmax(-1), (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    return DIVERGENCES["jsd"](*logps).sum()


def test_frozen_weight_gets_no_gradient():
    hidden, weight, *_ = operands()
    weight.requires_grad_(False)
    small_loss(hidden, weight).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(dense_loss(hidden, weight), hidden)[0])


def test_frozen_hidden_states_still_train_the_head():
    hidden, weight, *_ = operands()
    small_loss(hidden.detach(), weight).backward()
    torch.testing.assert_close(weight.grad, torch.autograd.grad(dense_loss(hidden, weight), weight)[0])


def test_gradient_flows_through_a_composed_weight():
    hidden, weight, *_ = operands()
    a, b = rand(2, DS, seed=11).requires_grad_(), rand(V, 2, seed=12).requires_grad_()
    frozen = weight.detach()
    fused = torch.autograd.grad(small_loss(hidden, frozen + b @ a), (a, b, hidden))
    dense = torch.autograd.grad(dense_loss(hidden, frozen + b @ a), (a, b, hidden))
    torch.testing.assert_close(fused, dense)


def test_tied_embedding_gets_both_gradients():
    _, weight, *_ = operands()
    ids = torch.arange(N) % V
    fused, dense = (loss(torch.tanh(weight[ids]), weight) for loss in (small_loss, dense_loss))
    torch.testing.assert_close(torch.autograd.grad(fused, weight), torch.autograd.grad(dense, weight))


def test_backward_twice_gives_the_same_gradient():
    hidden, weight, *_ = operands()
    loss = small_loss(hidden, weight)
    first = torch.autograd.grad(2 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_inference_mode_gives_the_same_value():
    hidden, weight, *_ = operands()
    with torch.inference_mode():
        assert torch.equal(small_loss(hidden, weight), small_loss(hidden.detach(), weight.detach()))


def test_metrics_alone_leave_zero_gradients():
    hidden, weight, *_, teacher_hidden, teacher_weight = operands()
    teacher = HiddenStates(teacher_hidden, Head(teacher_weight))
    total, terms = fused_linear_terms(hidden, Head(weight), teacher, terms_fn, tokens_of(), {})
    total.backward()
    assert total.item() == 0 and set(terms) == {"kl", "nll", "hits"}
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens_still_take_part_in_backward(dtype):
    hidden, weight, teacher_hidden, teacher_weight = operands(dtype, tokens=0)
    bias = torch.zeros(V, dtype=dtype, requires_grad=True)
    teacher = HiddenStates(teacher_hidden, Head(teacher_weight))
    total, terms = fused_linear_terms(hidden, Head(weight, bias), teacher, terms_fn, tokens_of(0), {"kl": 1.0})
    token_mean(total, 0, world_size=2).backward()
    assert total.item() == 0
    assert {name: tuple(values.shape) for name, values in terms.items()} == {"kl": (0,), "nll": (0,), "hits": (0,)}
    for operand in (hidden, weight, bias):
        assert operand.grad.shape == operand.shape and not operand.grad.any()


# Precision
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)])
def test_low_precision_operands_are_computed_in_float32(dtypes):
    hidden, weight, *_ = operands()
    low = hidden.detach().to(dtypes[0]).requires_grad_(), weight.detach().to(dtypes[1]).requires_grad_()
    exact = [operand.detach().double().requires_grad_() for operand in low]
    *_, teacher_hidden, teacher_weight = operands()
    loss = small_loss(*low, dtype=torch.float64)
    assert loss.dtype == torch.float32
    expected = small_loss(*exact)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    for gradient, reference, dtype in zip(
        torch.autograd.grad(loss, low), torch.autograd.grad(expected, exact), dtypes, strict=True
    ):
        assert gradient.dtype == dtype
        worst = 4 * max(torch.finfo(dtype).eps, 1e-5)  # 16 bits are rounded once, at the end; float32 all the way
        assert (gradient.double() - reference).abs().max() <= worst * reference.abs().max()


def test_small_gradients_of_many_chunks_add_up_in_float32():
    tokens = 4096
    hidden = torch.ones(tokens, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)

    def first_logit(student, teacher, chunk):
        return {"logit": student.logits[:, 0]}

    total, _ = fused_linear_terms(hidden, Head(weight), None, first_logit, {}, {"logit": 1.0}, chunk_bytes=1)
    total.backward()
    assert weight.grad.flatten().tolist() == [tokens, 0]  # adding ones in bfloat16 would stop at 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ambient_autocast_changes_nothing(dtype):
    hidden, weight, *_ = operands(dtype)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = small_loss(hidden, weight, dtype=dtype)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for plain, under_autocast in zip(*results, strict=True):
        assert plain.dtype == under_autocast.dtype
        assert torch.equal(plain, under_autocast)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_equals_cpu(dtype):
    tokens, ids = 50, 1000
    low = [rand(tokens, 64, seed=1, dtype=dtype), rand(ids, 64, seed=2, dtype=dtype) / 8]
    teacher = [rand(tokens, 32, seed=3, dtype=dtype), rand(ids, 32, seed=4, dtype=dtype) / 6]
    results = []
    for device in ("cpu", "cuda"):
        mine = [operand.to(device).requires_grad_() for operand in low]
        loss = fused_linear_divergence(*mine, *(each.to(device) for each in teacher), chunk_bytes=rows(16, ids, 4))
        results.append([each.cpu().float() for each in (loss, *torch.autograd.grad(loss, mine))])
        empty = fused_linear_divergence(
            mine[0][:0], mine[1], *(each.to(device)[:n] for each, n in zip(teacher, (0, ids), strict=True))
        )
        assert empty.item() == 0
        empty.backward()
    for cpu, cuda in zip(*results, strict=True):
        assert (cpu - cuda).abs().max() <= 4 * max(torch.finfo(dtype).eps, 1e-5) * cpu.abs().max()


# What does not fit together
def test_operands_that_do_not_fit_are_refused():
    hidden, weight, teacher_hidden, teacher_weight = operands()
    teacher = HiddenStates(teacher_hidden, Head(teacher_weight))
    call = [hidden, Head(weight), teacher, terms_fn, tokens_of(), {"kl": 1.0}]

    def refuses(match: str, error: type[Exception] = ConfigurationError, chunk_bytes: int = 1, **changed) -> None:
        arguments = [changed.get(f"_{i}", value) for i, value in enumerate(call)]
        with pytest.raises(error, match=match):
            fused_linear_terms(*arguments, chunk_bytes=chunk_bytes)

    refuses(r"\[N, D\]", _0=hidden[None])
    refuses("whole, not a shard", _1=Head(weight[:, :2]))
    refuses(r"others differ: \{'teacher': 3\}", _2=HiddenStates(teacher_hidden[:3], Head(teacher_weight)))
    refuses(r"others differ: \{'targets': 4, 'scale': 4\}", _4=tokens_of(4))
    refuses(r"\['scale'\] require gradients", _4={**tokens_of(), "scale": rand(N).requires_grad_()})
    refuses(r"given for \['typo'\].*'hits', 'kl', 'nll'", _5={"typo": 1.0})
    refuses("one value per token", _3=lambda student, *_: {"kl": student.logits})
    refuses("chunk_bytes", chunk_bytes=0)


def test_divergence_settings_that_do_not_fit_are_refused():
    hidden, weight, teacher_hidden, teacher_weight = operands()
    with pytest.raises(VocabularyError, match="13 ids and the teacher's 12.*vocab_size"):
        fused_linear_divergence(hidden, weight, teacher_hidden, teacher_weight[:-1])
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigurationError, match="temperature"):
            small_loss(hidden, weight, temperature=temperature)
    with pytest.raises(ConfigurationError, match="Did you mean"):
        small_loss(hidden, weight, divergence="jds")
    with pytest.raises(ConfigurationError, match="no parameter 'alpha'"):
        small_loss(hidden, weight, alpha=0.3)
