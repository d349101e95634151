"""Counting, summing and dividing: the same mean however tokens are split over micro-batches and ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from distill_trainers.losses.reduction import (
    count_of,
    count_trained_tokens,
    first_trained,
    masked_sum,
    means_of_sums,
    step_counts,
    step_weights,
    sum_per_row,
    token_mean,
    trained_mask,
    weighted_total,
    widest,
)

LABELS = torch.tensor([[7, -100, 3, 4], [-100, -100, -100, -100], [5, 6, -100, 8]])


def test_trained_mask_shifts_by_one_and_ignores_the_first_label():
    expected = [[False, True, True], [False, False, False], [True, False, True]]
    assert trained_mask(LABELS).tolist() == expected
    assert trained_mask(LABELS[:, :1]).shape == (3, 0)


def test_one_predicted_label_stands_for_each_row():
    """Neither label 0, nor a second stretch; a row with nothing but label 0 has none."""
    labels = torch.cat([LABELS, torch.tensor([[9, -100, -100, -100], [1, 2, 3, 4]])])
    places = [row.nonzero().flatten().tolist() for row in first_trained(labels)]
    assert places == [[2], [], [1], [], [1]]


def test_count_is_over_all_batches_of_any_length():
    count = count_trained_tokens([{"labels": LABELS}, {"labels": LABELS[:, :2]}, {"labels": LABELS[:0]}])
    assert count.item() == 4 + 1
    assert count.dtype == torch.int64 and count.shape == ()
    assert count_trained_tokens([]).item() == 0


def test_count_equals_the_number_of_masked_positions():
    batches = [{"labels": torch.randint(-1, 2, (3, n)).where(torch.rand(3, n) < 0.5, -100)} for n in (2, 5, 9)]
    assert count_trained_tokens(batches) == sum(trained_mask(batch["labels"]).sum() for batch in batches)


def test_sum_per_row_equals_a_loop_and_passes_gradients():
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 2, 2, 0, 3, 2])
    sums = sum_per_row(values, rows, num_rows=5)
    torch.testing.assert_close(sums, torch.stack([values[rows == row].sum() for row in range(5)]))
    (gradient,) = torch.autograd.grad(sums @ torch.arange(5.0, dtype=torch.float64), values)
    assert gradient.tolist() == rows.tolist()
    assert sum_per_row(values[:0], rows[:0], num_rows=2).tolist() == [0, 0]


def test_masked_sum_does_not_touch_what_is_outside():
    values = torch.tensor([[1.0, float("nan")], [2.0, float("inf")]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    total = masked_sum(values, mask)
    assert total.item() == 3
    assert torch.autograd.grad(total, values)[0].tolist() == [[1, 0], [1, 0]]
    assert masked_sum(values, mask, dim=1).tolist() == [1, 2]


def test_token_mean_is_the_same_for_any_split_over_micro_batches_and_ranks():
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(10, 3, dtype=torch.float64)
    losses = (inputs @ weight).square()
    expected = losses.mean()
    (expected_gradient,) = torch.autograd.grad(expected, weight, retain_graph=True)

    ranks = [losses[:7].split(3), losses[7:].split(2)]  # unequal micro-batches on two ranks
    shares = [sum(token_mean(part.sum(), torch.tensor(10), world_size=2) for part in parts) for parts in ranks]
    averaged = [torch.autograd.grad(share, weight, retain_graph=True)[0] / 2 for share in shares]  # what DDP does
    torch.testing.assert_close(sum(averaged), expected_gradient)
    torch.testing.assert_close(sum(shares) / 2, expected)


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_token_mean_of_nothing_is_zero_and_keeps_the_graph(count):
    weight = torch.ones(3, requires_grad=True)
    mean = token_mean(weight.sum(), count, world_size=4)
    assert mean.item() == 0
    assert torch.autograd.grad(mean, weight)[0].tolist() == [0, 0, 0]


def test_token_mean_keeps_double_precision():
    assert token_mean(torch.tensor(1.0, dtype=torch.float64), torch.tensor(3)).item() == 1 / 3


def test_each_term_is_divided_by_its_own_count_whatever_the_micro_batches():
    """`right` is a mean over the tokens whose entry is 1, `row` over those with 1 once a row, `nll` over all."""
    labels = torch.tensor([[9, 1, 1, 1], [9, 1, 1, -100], [9, 1, -100, -100]])
    entries = {"token_right": torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 0, 1, 1]])}
    entries["token_first"] = torch.tensor([[0, 1, 0, 0]]).expand(3, 4)
    batch = {"labels": labels, **entries}
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    divisors = {"right": "token_right", "row": "token_first", "unused": "token_right"}
    counts = step_counts(parts, divisors)
    assert counts.tolist() == [6, 3, 3] and step_counts(parts, {}).item() == 6
    assert [count_of(name, counts, divisors).item() for name in ("nll", "right", "row")] == [6, 3, 3]

    values = torch.rand(6, dtype=torch.float64)
    mask = trained_mask(labels)
    right, first = (entries[f"token_{name}"][:, 1:][mask].double() for name in ("right", "first"))
    terms = {"nll": values, "right": values * right, "row": 2 * values * first, "metric": values * torch.nan}
    weights = {"nll": 0.5, "right": 2.0, "row": 1.0}
    scaled = step_weights(weights, counts, divisors)
    total = weighted_total(terms, scaled, start=torch.zeros(()))
    expected = 0.5 * values.mean() + 2.0 * (values * right).sum() / 3 + (2 * values * first).sum() / 3
    torch.testing.assert_close(token_mean(total, counts[0]), expected)

    sums = {name: values.sum().item() for name, values in terms.items() if name in weights} | {"/token_right": 3.0}
    means = means_of_sums(sums, 6.0, divisors)
    assert means == {"nll": sums["nll"] / 6, "right": sums["right"] / 3, "row": sums["row"] / 6}


def test_a_device_without_float64_gets_float32():
    mps = SimpleNamespace(device=torch.device("mps"), float=lambda: "float32", double=lambda: pytest.fail("MPS"))
    assert widest(mps) == "float32" and widest(torch.zeros(1)).dtype == torch.float64
