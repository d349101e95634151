"""The only place where per-token values are masked, counted, summed and divided.

Shapes: B rows, T positions, N trained tokens. Labels are unshifted as in Hugging Face models: `labels[b, t]` is
predicted at position t-1, so a label at position 0 is never trained on and masks have T-1 columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100


def trained_mask(labels: Tensor) -> Tensor:
    """Labels `[B, T]` to bool `[B, T-1]`: True where position t predicts a trained token t+1."""
    return labels[:, 1:] != IGNORE_INDEX


def count_trained_tokens(batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Number of trained tokens in `batches`, an int64 scalar on the device of their `labels` `[B, T]`.

    Count after rollouts have replaced completions, over all micro-batches of the optimiser step; summing over ranks
    is the caller's. No batches count 0.
    """
    if not batches:
        return torch.zeros((), dtype=torch.int64)
    return torch.stack([trained_mask(batch["labels"]).sum() for batch in batches]).sum()


def sum_over_trained(batches: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """Sum of the entry `name` `[B, T]` over the trained tokens of `batches`, a float32 scalar; no batches give 0."""
    if not batches:
        return torch.zeros(())
    return torch.stack(
        [masked_sum(batch[name][:, 1:].float(), trained_mask(batch["labels"])) for batch in batches]
    ).sum()


def sum_per_row(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sums values `[N]` by the row index `[N]` each belongs to: `[num_rows]`, 0 for a row without tokens."""
    return values.new_zeros(num_rows).index_add(0, rows, values)


def sum_per_example(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Sums values `[N]` of a batch's trained tokens by example: `[B]`.

    A row is an example, unless the batch has an entry `examples` that tells the example of each of its rows.
    """
    rows = trained_mask(batch["labels"]).nonzero()[:, 0]
    examples = batch.get("examples")
    if examples is None:
        return sum_per_row(values, rows, len(batch["labels"]))
    return sum_per_row(values, examples[rows], int(examples.max()) + 1)


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `values` where the bool `mask` of the same shape is True, over `dim` or over everything.

    What lies outside the mask is replaced, not multiplied by 0: padding may hold NaN or infinity.
    """
    return torch.where(mask, values, 0).sum(dim)


def token_mean(total: Tensor, count: Tensor | int, world_size: int = 1) -> Tensor:
    """This rank's share of the mean over all trained tokens of the optimiser step: total * world_size / count.

    Args:
        total: sum over the tokens of this micro-batch on this rank.
        count: trained tokens of all micro-batches on all ranks. At 0 the result is 0, still part of the graph, so
            that a rank without tokens joins the collectives of backward.
        world_size: number of ranks whose gradients DDP, FSDP or ZeRO will average. Averaging divides by it once
            more than the sum over ranks needs; the factor undoes that. Use 1 for a loss to be reported or summed.
    """
    count = torch.as_tensor(count, device=total.device)
    return total * world_size / count.clamp(min=1) * (count > 0)
