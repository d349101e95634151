"""What the fused loss spends: no `[N, V]` tensor, one projection per model and chunk, no idle gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill_trainers.losses import DIVERGENCES, fused_linear, fused_linear_divergence, resolve_divergence, workspace
from distill_trainers.losses.closed_form import closed_form

N, DS, DT, V = 11, 6, 9, 13


def operands(dtype: torch.dtype = torch.float64, tokens: int = N, ids: int = V) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, DS), (ids, DS), (tokens, DT), (ids, DT)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [each.requires_grad_(i < 2) for i, each in enumerate(made)]


def small_loss(*of: Tensor, chunk: int = 3, itemsize: int = 8, **options) -> Tensor:
    return fused_linear_divergence(*of, chunk_bytes=chunk * len(of[1]) * itemsize, **options)


class Recorder(TorchDispatchMode):
    """Records name and shape of every tensor that an operation makes, and holds it so that no memory comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []
        self.held: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                self.made.append((func.overloadpacket.__name__, tuple(each.shape)))
                self.held.append(each)
        return out

    @property
    def largest(self) -> int:
        return max(math.prod(shape) for _, shape in self.made)

    def buffers(self, elements: int) -> int:
        """Number of different pieces of memory of at least so many elements."""
        storages = (each.untyped_storage() for each in self.held)
        return len({each.data_ptr() for each in storages if each.nbytes() >= elements * 4})

    @property
    def products(self) -> list[tuple[int, ...]]:
        return [shape for name, shape in self.made if name in ("mm", "addmm_")]


def test_frozen_weight_costs_no_weight_gradient():
    hidden, weight, *teacher = operands()
    weight.requires_grad_(False)
    with Recorder() as recorder:
        loss = small_loss(hidden, weight, *teacher)
        loss.backward()
    assert weight.grad is None
    assert (V, DS) not in recorder.products


@pytest.mark.parametrize("frozen", [False, True])
def test_no_gradient_work_without_need(frozen, monkeypatch):
    hidden, weight, *teacher = operands()
    expected = small_loss(hidden, weight, *teacher).detach()
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pytest.fail("a gradient was computed"))
    if frozen:
        loss = small_loss(hidden.detach(), weight.detach(), *teacher)
    else:
        with torch.no_grad():
            loss = small_loss(hidden, weight, *teacher)
    assert not loss.requires_grad
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_never_holds_all_logits(divergence, dtype):
    tokens, ids, chunk = 64, 500, 16  # 20 fit in a chunk, and four chunks are all alike
    hidden, weight, teacher_hidden, teacher_weight = operands(dtype, tokens, ids)
    with Recorder() as fused:
        loss = fused_linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, divergence=divergence, chunk_bytes=(chunk + 4) * ids * 4
        )
        loss.backward()
    assert fused.largest == chunk * ids > weight.numel()
    with Recorder() as dense:
        DIVERGENCES[divergence](
            (hidden @ weight.T).log_softmax(-1), (teacher_hidden @ teacher_weight.T).log_softmax(-1)
        )
    assert dense.largest == tokens * ids


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if closed_form(resolve_divergence(name))])
def test_a_closed_form_needs_three_buffers_however_many_chunks(divergence, chunks, monkeypatch):
    """Student's logits, teacher's logits, gradient; without a gradient two."""
    monkeypatch.setattr(workspace, "_CPU_BLOCK_BYTES", 1)
    chunk, ids = 20, 500
    made = operands(torch.float32, chunk * chunks, ids)
    for expected, grad in ((3, True), (2, False)):
        with Recorder() as recorder, torch.set_grad_enabled(grad):
            loss = fused_linear_divergence(*made, divergence=divergence, temperature=2.0, chunk_bytes=chunk * ids * 4)
            if grad:
                loss.backward()
        assert recorder.buffers(chunk * ids) == expected


def test_a_gpu_gets_chunks_of_a_thousand_tokens_and_more():
    sizes = [workspace.chunk_bytes_of(mib, device) for mib, device in ((None, "cpu"), (None, "cuda"), (1e-9, "cpu"))]
    assert sizes == [2**25, 2**30, 1] and sizes[1] // (4 * 151_936) > 1700


def test_chunks_are_about_equal():
    assert [len(range(1024)[rows]) for rows in fused_linear._chunks(1024, 341)] == [256] * 4
    for tokens, at_most in ((0, 3), (1, 3), (7, 3), (10, 3), (100, 7), (5, 1)):
        parts = [range(tokens)[rows] for rows in fused_linear._chunks(tokens, at_most)]
        assert [i for part in parts for i in part] == list(range(tokens))
        assert max(map(len, parts)) <= at_most and len(parts) == max(1, math.ceil(tokens / at_most))


def test_each_model_is_projected_once_per_chunk_and_each_gradient_is_one_product():
    with Recorder() as recorder, torch.no_grad():
        small_loss(*operands())
    lengths = [3] * (N // 3) + [N % 3]
    assert recorder.products == [(n, V) for n in lengths for _ in range(2)]
    with Recorder() as recorder:
        small_loss(*operands()).backward()
    assert recorder.products == [shape for n in lengths for shape in [(n, V), (n, V), (n, DS), (V, DS)]]


@pytest.fixture(params=[False, True], ids=["products alone", "products onto sums"])
def wide_matmul(request, monkeypatch):
    """The product with a wider result that CUDA has, done here in two steps."""
    plain = torch.mm

    def addmm(total, left, right, beta, out_dtype, out):
        assert out.data_ptr() == total.data_ptr() and left.dtype == right.dtype and out_dtype == out.dtype
        return out.copy_(mm(left, right, out_dtype) + (total if beta else 0))

    def mm(left, right, out_dtype):
        assert left.dtype == right.dtype == torch.bfloat16 and out_dtype == torch.float32
        return plain(left.float(), right.float())

    monkeypatch.setattr(torch, "mm", mm)
    if request.param:
        monkeypatch.setattr(torch, "addmm", addmm)
    probes = fused_linear._multiplies_widely, fused_linear._accumulates_widely
    for probe in probes:
        probe.cache_clear()
    yield
    assert fused_linear._accumulates_widely("cpu", torch.bfloat16) == request.param
    for probe in probes:
        probe.cache_clear()


@pytest.mark.parametrize("tokens", [N, 0])
def test_bfloat16_operands_are_multiplied_as_they_are_where_the_device_can(wide_matmul, tokens):
    assert fused_linear._multiplies_widely("cpu", torch.bfloat16)
    narrow = operands(torch.bfloat16, tokens)
    exact = [each.detach().double().requires_grad_(each.requires_grad) for each in narrow]
    options = {"student_scale": 0.5, "student_soft_cap": 3.0, "vocab_size": 10}
    loss, expected = small_loss(*narrow, itemsize=4, **options), small_loss(*exact, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(
        torch.autograd.grad(loss, narrow[:2]), torch.autograd.grad(expected, exact[:2]), strict=True
    ):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), reference, rtol=0.02, atol=0.004)


def test_a_device_without_the_wide_product_is_noticed(monkeypatch):
    monkeypatch.setattr(torch, "mm", lambda left, right, out_dtype: (left @ right).to(out_dtype))
    fused_linear._multiplies_widely.cache_clear()
    assert not fused_linear._multiplies_widely("cpu", torch.bfloat16)  # it rounded to bfloat16 on the way
    assert not fused_linear._multiplies_widely("cpu", torch.float32)
    fused_linear._multiplies_widely.cache_clear()
