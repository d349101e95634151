"""The only place where per-token values are masked, counted, summed and divided.

Shapes: B rows, T positions, N trained tokens. Labels are unshifted as in Hugging Face models: `labels[b, t]` is
predicted at position t-1, so a label at position 0 is never trained on and masks have T-1 columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def trained_mask(labels: Tensor) -> Tensor:
    """Turn labels `[B, T]` into bool `[B, T-1]`: True where position t predicts a trained token t+1."""
    return labels[:, 1:] != IGNORE_INDEX


def first_trained(labels: Tensor) -> Tensor:
    """Mark, in bool `[B, T]`, the first trained label of each row: what stands for the row in sums over tokens.

    It lies at position 1 or later: one at 0 is predicted by nothing, so that a row whose prompt is empty is not counted
    if that label stands for it.
    """
    trained = torch.nn.functional.pad(trained_mask(labels), (1, 0))
    return trained & (trained.cumsum(1) == 1)


def count_trained_tokens(batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Count trained tokens of `batches`: an int64 scalar on the device of their `labels` `[B, T]`.

    Count after rollouts have replaced completions, over all micro-batches of the optimiser step; summing over ranks
    is the caller's. No batches count 0.
    """
    if not batches:
        return torch.zeros((), dtype=torch.int64)
    return torch.stack([trained_mask(batch["labels"]).sum() for batch in batches]).sum()


def sum_over_trained(batches: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """Sum entry `name` `[B, T]` over the trained tokens of `batches`, a float32 scalar; no batches give 0."""
    if not batches:
        return torch.zeros(())
    sums = [masked_sum(batch[name][:, 1:].float(), trained_mask(batch["labels"])) for batch in batches]
    return torch.stack(sums).sum()


def sum_per_row(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sum values `[N]` by the row index `[N]` each belongs to: `[num_rows]`, 0 for a row without tokens."""
    return values.new_zeros(num_rows).index_add(0, rows, values)


def owners_of(labels: Tensor, owners: Tensor, count: int) -> Tensor:
    """Return which of `count` owners each trained token `[N]` belongs to, from the owners `[R]` of the first rows.

    Tokens of the other rows of labels `[B, T]`, such as text added to a batch, belong to number `count`: to nobody.
    """
    every = torch.nn.functional.pad(owners, (0, len(labels) - len(owners)), value=count)
    return every[trained_mask(labels).nonzero()[:, 0]]


def mean_per_row(sums: Tensor, counts: Tensor) -> Tensor:
    """Divide sums by row `[R]` by the rows' numbers of tokens `[R]`; a row without tokens keeps its 0."""
    return sums / counts.clamp(min=1)


def sum_per_example(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum values `[N]` of a batch's trained tokens by example: `[B]`.

    A row is an example, unless the batch has an entry `examples` that tells the example of each of its rows.
    """
    rows = trained_mask(batch["labels"]).nonzero()[:, 0]
    examples = batch.get("examples")
    if examples is None:
        return sum_per_row(values, rows, len(batch["labels"]))
    return sum_per_row(values, examples[rows], int(examples.max()) + 1)


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum `values` where the bool `mask` of the same shape is True, over `dim` or over everything.

    What lies outside the mask is replaced, not multiplied by 0: padding may hold NaN or infinity.
    """
    return torch.where(mask, values, 0).sum(dim)


def token_mean(total: Tensor, count: Tensor | int, world_size: int = 1) -> Tensor:
    """Return this rank's share of the mean over the step's trained tokens: total * world_size / count.

    Args:
        total: sum over the tokens of this micro-batch on this rank.
        count: trained tokens of all micro-batches on all ranks. At 0 the result is 0, still part of the graph, so
            that a rank without tokens joins the collectives of backward.
        world_size: number of ranks whose gradients DDP, FSDP or ZeRO will average. Averaging divides by it once
            more than the sum over ranks needs; the factor undoes that. Use 1 for a loss to be reported or summed.
    """
    count = torch.as_tensor(count, device=total.device)
    return total * world_size / count.clamp(min=1) * (count > 0)


def window_mean(value: Tensor, micro_batches: int) -> Tensor:
    """Return a micro-batch's share of the mean of `value` over the micro-batches of a step.

    Averaging over processes, which DDP, FSDP and ZeRO do with gradients, makes it the mean over theirs too.
    """
    return value / micro_batches


def weighted_total(terms: Mapping[str, Tensor], weights: Mapping[str, Any], start: Tensor) -> Tensor:
    """Add to `start`, in the order of `weights`, each weight times the sum of its term `[N]` over the tokens.

    Terms without a weight are metrics.
    """
    total = start
    for name, weight in weights.items():
        total = total + weight * terms[name].sum()
    return total


# ---- Terms that are not all divided by the same count ---------------------------------------------------------------
#
# `divisors` tells of a term which batch entry `[B, T]`, summed over the trained tokens of the whole optimiser step,
# divides it; a term that it does not name is divided by the number of those tokens.


def step_counts(batches: Sequence[Mapping[str, Tensor]], divisors: Mapping[str, str]) -> Tensor:
    """Count what terms are divided by: trained tokens and, behind them, the divisors' sums by name.

    Returns:
        a scalar, or one tensor for all, so that processes add them up in one call.
    """
    tokens, entries = count_trained_tokens(batches), sorted(set(divisors.values()))
    if not entries:
        return tokens
    return torch.stack([tokens, *(sum_over_trained(batches, entry).to(tokens) for entry in entries)])


def count_of(term: str, counts: Tensor, divisors: Mapping[str, str]) -> Tensor:
    """Return what of `step_counts` divides a term."""
    if term not in divisors:
        return counts.flatten()[0]
    return counts[1 + sorted(set(divisors.values())).index(divisors[term])]


def step_weights(weights: Mapping[str, float], counts: Tensor, divisors: Mapping[str, str]) -> dict[str, Any]:
    """Weight a total that is going to be divided by the trained tokens, whatever divides its terms."""
    scaled: dict[str, Any] = dict(weights)
    for name in weights.keys() & divisors.keys():
        count = count_of(name, counts, divisors)
        # An integer tensor would take a Python number for float32, and be off by 1e-8.
        scaled[name] = scaled[name] * (counts[0] / widest(count).clamp(min=1))
    return scaled


def widest(values: Tensor) -> Tensor:
    """Return values in float64; in float32 on a device that has no more (MPS)."""
    return values.float() if values.device.type == "mps" else values.double()


def means_of_sums(sums: Mapping[str, float], tokens: float, divisors: Mapping[str, str]) -> dict[str, float]:
    """Return means over a whole set from sums over it; an entry's sum, where there is one, is called `/entry`."""
    counts = {name: sums.get(f"/{entry}", tokens) for name, entry in divisors.items()}
    return {name: sums[name] / max(counts.get(name, tokens), 1) for name in sums if not name.startswith("/")}


def means_of_totals(totals: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Divide each total by the count of its name: one without a count stays a total, one over nothing is left out."""
    kept = {name: total for name, total in totals.items() if counts.get(name, 1)}
    return {name: total / counts[name] if name in counts else total for name, total in kept.items()}
