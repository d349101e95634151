"""What a sampler thought of the tokens that it drew, as entries of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..losses.reduction import IGNORE_INDEX
from ..losses.sampler_ratio import SAMPLED, SAMPLER_LOGPS

Logps = Sequence[float] | None


def with_sampler_logps(batch: Mapping[str, Any], logps: Sequence[Logps]) -> dict[str, Any]:
    """Add the sampler's log-probabilities to a batch whose completions were sampled.

    Args:
        batch: with `labels` `[B, T]`, trained on its completions alone.
        logps: of the tokens of each completion, after temperature and filters; None where they are not known.

    Returns:
        the batch with `SAMPLER_LOGPS` and `SAMPLED`, float32 `[B, T]`, 0 outside the completions that are known.

    Raises:
        ValueError: not one for each token.
    """
    drawn = batch["labels"] != IGNORE_INDEX
    known = drawn & torch.tensor([row is not None for row in logps], device=drawn.device)[:, None]
    values = torch.tensor([value for row in logps for value in row or ()], dtype=torch.float32, device=drawn.device)
    if len(values) != int(known.sum()):
        raise ValueError(f"Got {len(values)} log-probabilities for {int(known.sum())} tokens; expected one for each.")
    entry = torch.zeros(drawn.shape, dtype=torch.float32, device=drawn.device)
    return {**batch, SAMPLER_LOGPS: entry.masked_scatter(known, values), SAMPLED: known.float()}


def sampler_logps_of(batch: Mapping[str, Tensor]) -> list[list[float] | None]:
    """Return what `with_sampler_logps` was given; None for each row of a batch without."""
    if SAMPLER_LOGPS not in batch:
        return [None] * len(batch["labels"])
    drawn, known = batch["labels"] != IGNORE_INDEX, batch[SAMPLED] > 0
    rows = zip(batch[SAMPLER_LOGPS], drawn, known, strict=True)
    return [values[mask].tolist() if bool(told[mask].all()) else None for values, mask, told in rows]
