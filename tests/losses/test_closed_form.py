"""The closed-form gradients against the same divergences by autograd, and against what they must do at the edges."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill_trainers.exceptions import ConfigurationError, VocabularyError
from distill_trainers.losses import DIVERGENCES, jsd, resolve_divergence, token_divergence, workspace
from distill_trainers.losses.closed_form import closed_form
from distill_trainers.losses.workspace import Workspace, row_blocks
from distill_trainers.signals import TokenLogits

WITHOUT_CLOSED_FORM = ["adaptive_kl"]
CLOSED = [name for name in DIVERGENCES if name not in WITHOUT_CLOSED_FORM]
CASES = [(name, {}) for name in CLOSED] + [
    *(("jsd", {"beta": beta}) for beta in (0, 0.01, 0.3, 0.99, 1)),
    *((name, {"alpha": alpha}) for name in ("skew_forward_kl", "skew_reverse_kl") for alpha in (0, 0.01, 0.5, 0.95)),
    *(("lk", {"kl_weight": weight}) for weight in (0, 0.1, 1)),
    *(("taid", {"t": t}) for t in (0.0, 0.7, 1.0)),
]


def logits_pair(tokens: int = 6, ids: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    pair = spread * torch.randn(2, tokens, ids, generator=generator, dtype=torch.float64)
    return pair[0].to(dtype), pair[1].to(dtype)


def by_autograd(divergence, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of a weighted sum of them, from the functions of log-probabilities."""
    student = student.detach().requires_grad_()
    values = divergence(F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1))
    return values.detach(), torch.autograd.grad(values @ weights_for(values), student)[0]


def by_rule(divergence, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    values = token_divergence(divergence, TokenLogits(student), TokenLogits(teacher), temperature)
    return values.detach(), torch.autograd.grad(values @ weights_for(values), student)[0]


def weights_for(values: Tensor) -> Tensor:
    return torch.linspace(-0.5, 2, len(values), dtype=values.dtype)


@pytest.fixture(params=[False, True], ids=["one block", "a row per block"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(workspace, "_CPU_BLOCK_BYTES", 1)


def test_which_divergences_have_a_closed_form():
    found = [name for name in DIVERGENCES if closed_form(resolve_divergence(name)) is None]
    assert found == WITHOUT_CLOSED_FORM
    assert closed_form(functools.partial(jsd, beta=0.3)) is not None
    assert closed_form(lambda student, teacher: jsd(student, teacher)) is None


@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_value_and_gradient_equal_autograd(name, params, temperature, blocks):
    divergence = resolve_divergence(name, **params)
    student, teacher = logits_pair()
    value, gradient = by_rule(divergence, student, teacher, temperature)
    expected, expected_gradient = by_autograd(divergence, student, teacher, temperature)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.parametrize("spread", [0.01, 2.0, 12.0])
def test_float32_is_as_near_to_float64_as_autograd_is(name, params, spread):
    divergence = resolve_divergence(name, **params)
    student, teacher = logits_pair(tokens=4, ids=5000, dtype=torch.float32, spread=spread)
    exact = by_autograd(divergence, student.double(), teacher.double())
    found, graph = (by(divergence, student, teacher) for by in (by_rule, by_autograd))
    for mine, theirs, expected in zip(found, graph, exact, strict=True):
        floor = 1e-5 * (1 + expected.norm())
        assert (mine.double() - expected).norm() <= 10 * (theirs.double() - expected).norm() + floor


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize(("dtype", "ids"), [(torch.float32, 50_257), (torch.float64, 11)])
def test_exactly_zero_at_equality(name, dtype, ids):
    logits, _ = logits_pair(tokens=3, ids=ids, dtype=dtype, spread=4.0)
    value, gradient = by_rule(DIVERGENCES[name], logits, logits)
    assert (value == 0).all()
    assert gradient.abs().max() < 200 * torch.finfo(dtype).eps  # rounding gave 10


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("distance", [1e-7, 1e-5, 1e-3, 1.0])
def test_never_negative_in_float32(name, distance):
    logits, noise = logits_pair(tokens=20, ids=3000, dtype=torch.float32, spread=3.0)
    value, _ = by_rule(DIVERGENCES[name], logits, logits + distance * noise)
    assert (value >= 0).all()


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite_and_right(name, dtype):
    rows = torch.tensor(
        [[0.0, -1e4, 3.0, -2.0], [1e4, 0.0, 0.0, 0.0], [0.0, 1e4, 1.0, -95.0], [1.0, 2.0, 3.0, 4.0], [-95.0, 90, 0, 1]],
        dtype=dtype,
    )
    for student in rows:
        value, gradient = by_rule(DIVERGENCES[name], student.expand(5, 4), rows)
        assert value.isfinite().all() and (value >= 0).all() and gradient.isfinite().all()
        expected, expected_gradient = by_autograd(DIVERGENCES[name], student.expand(5, 4).double(), rows.double())
        near = 1e5 * torch.finfo(dtype).eps  # a logit of 1e4 is rounded to 1e4 eps
        torch.testing.assert_close(value.double(), expected, rtol=near, atol=near)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=near, atol=near)


@pytest.mark.parametrize("name", [name for name in CLOSED if name not in ("reverse_kl", "logit_mse")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teacher_probability_zero_is_the_limit_of_small_ones(name, dtype):
    student, teacher = logits_pair(dtype=dtype)
    teacher[:, 2] = -1e4
    expected = by_rule(DIVERGENCES[name], student, teacher)
    teacher[:, 2] = -math.inf
    torch.testing.assert_close(by_rule(DIVERGENCES[name], student, teacher), expected)


@pytest.mark.parametrize(
    ("name", "masked"), [(name, at) for name in CLOSED for at in (-1e4, -math.inf) if (name, at) != ("logit_mse", -1e4)]
)
def test_an_id_that_neither_can_say_changes_nothing(name, masked):
    student, teacher = logits_pair(dtype=torch.float32)
    value, gradient = by_rule(DIVERGENCES[name], student, teacher)
    student, teacher = F.pad(student, (0, 1), value=masked), F.pad(teacher, (0, 1), value=-math.inf)
    torch.testing.assert_close(by_rule(DIVERGENCES[name], student, teacher), (value, F.pad(gradient, (0, 1))))


def test_reverse_kl_is_huge_where_only_the_student_puts_mass():
    value, _ = by_rule("reverse_kl", torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]]))
    assert value.item() > 1e30


@pytest.mark.parametrize("name", CLOSED)
def test_nan_is_not_hidden(name):
    student, teacher = logits_pair(dtype=torch.float32)
    student[1, 3] = math.nan
    value, gradient = by_rule(DIVERGENCES[name], student, teacher)
    assert value[1].isnan() and value[0].isfinite()
    assert gradient[1].isnan().any() and gradient[0].isfinite().all()


def test_no_gradient_is_made_where_none_is_wanted():
    student, teacher = logits_pair()
    space = Workspace()
    with torch.no_grad():
        silent = token_divergence("jsd", TokenLogits(student.requires_grad_(), space), TokenLogits(teacher))
    frozen = token_divergence("jsd", TokenLogits(student.detach(), space), TokenLogits(teacher))
    assert not space._lent and not silent.requires_grad and not frozen.requires_grad
    wanted = token_divergence("jsd", TokenLogits(student, space), TokenLogits(teacher))
    assert len(space._lent) == 1 and wanted.requires_grad
    torch.testing.assert_close(silent, wanted, rtol=0, atol=0)
    torch.testing.assert_close(frozen, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("with_workspace", [False, True])
def test_backward_may_run_twice_on_a_kept_graph(with_workspace):
    student, teacher = logits_pair()
    student.requires_grad_()
    space = Workspace() if with_workspace else None
    value = token_divergence("jsd", TokenLogits(student, space), TokenLogits(teacher)).sum()
    gradients = [torch.autograd.grad(3 * value, student, retain_graph=keep)[0].clone() for keep in (True, True, False)]
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_logits_are_left_as_they_are():
    student, teacher = logits_pair()
    before = student.clone(), teacher.clone()
    for name in CLOSED:
        for temperature in (1.0, 2.0):
            by_rule(name, student, teacher, temperature)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


def test_functions_of_your_own_go_through_autograd():
    student, teacher = logits_pair()

    def own(student_logps, teacher_logps):
        return (student_logps - teacher_logps).abs().sum(-1)

    torch.testing.assert_close(by_rule(own, student, teacher, 2.0), by_autograd(own, student, teacher, 2.0))
    expected = by_autograd(DIVERGENCES["adaptive_kl"], student, teacher, 2.0)
    torch.testing.assert_close(by_rule("adaptive_kl", student, teacher, 2.0), expected)


def test_what_does_not_fit_is_refused():
    student, teacher = (TokenLogits(each) for each in logits_pair())
    with pytest.raises(VocabularyError, match=r"\(6, 9\) and the teacher's \(6, 8\).*vocab_size"):
        token_divergence("jsd", student, TokenLogits(teacher.logits[:, :8]))
    with pytest.raises(ConfigurationError, match="Did you mean 'jsd'"):
        token_divergence("jds", student, teacher)


# The workspace itself
def test_buffers_are_handed_out_once_until_the_reset():
    space = Workspace()
    first, second = (space.take((4, 5), torch.float32, torch.device("cpu")) for _ in range(2))
    assert first.data_ptr() != second.data_ptr() and space.lent(first) and not space.lent(torch.empty(4, 5))
    space.reset()
    assert not space.lent(first)
    again = space.take((3, 5), torch.float32, torch.device("cpu"))
    assert again.data_ptr() in (first.data_ptr(), second.data_ptr()) and again.shape == (3, 5)
    assert space.take((3, 5), torch.float64, torch.device("cpu")).dtype == torch.float64
    assert space.take((5, 5), torch.float32, torch.device("cpu")).shape == (5, 5)  # the one left is too small


@pytest.mark.parametrize(("rows", "ids"), [(0, 7), (1, 7), (1000, 7), (3, 10**6), (37, 5000)])
def test_blocks_cover_every_row_once(rows, ids):
    values = torch.empty(1).expand(rows, ids)
    covered = [i for block in row_blocks(values) for i in range(rows)[block]]
    assert covered == list(range(rows))
