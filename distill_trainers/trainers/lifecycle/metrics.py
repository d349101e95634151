"""What happened since the last log, over all micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...data.routing import TEACHER_INDEX
from ...losses.reduction import count_of, means_of_totals, owners_of, step_counts, sum_per_row, trained_mask

if TYPE_CHECKING:
    from accelerate import Accelerator


# Bins of ratios go by asinh(_FINE * log ratio), which is log ratio itself near 1 and its logarithm far from it.
_FINE, _BINS_PER_UNIT, _BINS = 200.0, 50, 550


class RunningMetrics:
    """Sums and means by name; nothing waits for the device, and no process for another, until `read`.

    All processes must add the same names between two reads. A mean is a total over a count, so that rows of any length
    on any process weigh alike; a mean of nothing is left out.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._histograms: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._totals)

    def add_sums(self, **values: Tensor | float) -> None:
        """Add to quantities whose sum is of interest."""
        _add(self._totals, values, self.device)

    def add_means(self, totals: Mapping[str, Tensor | float], count: Tensor | float) -> None:
        """Add totals over the same `count` of things, whose mean is of interest."""
        _add(self._totals, totals, self.device)
        _add(self._counts, dict.fromkeys(totals, count), self.device)

    def add_batch(self, batch: Mapping[str, Tensor], trained: Tensor) -> None:
        """Add what there is to know of a micro-batch: `trained` tokens, those that are cut, and how much is padding.

        The last is of the student's tokens. Packed batches do not tell: their padding is a row like others.
        """
        self.add_sums(trained_tokens=trained)
        if "token_cut" in batch:
            self.add_sums(cut_characters=batch["token_cut"].sum())
        masks = [batch[name] for name in ("attention_mask", "encoder_mask") if name in batch]
        if masks:
            padded = torch.stack([(mask == 0).sum() for mask in masks]).sum()
            self.add_means({"padding_share": padded}, sum(mask.numel() for mask in masks))

    def add_quantiles(self, name: str, values: Tensor, counted: Tensor) -> None:
        """Take in ratios `[n]` whose 5 % and 95 % quantiles are of interest, where `counted` `[n]` is not 0.

        They are kept as counts of bins, so that quantiles do not depend on how tokens were cut into micro-batches. The
        bins are 1e-4 wide at 1 and 2 % wide far from it.
        """
        places = (torch.asinh(_FINE * values.float().log()) * _BINS_PER_UNIT).round().clamp(-_BINS, _BINS) + _BINS
        places = places.nan_to_num(_BINS)  # the loss is NaN as well, and says so
        empty = torch.zeros(2 * _BINS + 1, device=values.device)
        counts = empty.index_add(0, places.long(), counted.float()).to(self.device)
        self._histograms[name] = self._histograms[name] + counts if name in self._histograms else counts

    def add_terms(
        self,
        names: Sequence[str],
        batch: Mapping[str, Tensor],
        terms: Mapping[str, Tensor],
        divisors: Mapping[str, str],
    ) -> None:
        """Add the terms `[N]` of a batch's trained tokens, over all of them and by teacher.

        Args:
            names: of several teachers.
            divisors: as in `losses.reduction`; those whose entry the batch lacks divide nothing.
        """
        divisors = {name: entry for name, entry in divisors.items() if entry in batch}
        counts = step_counts([batch], divisors)
        for name, values in terms.items():
            self.add_means({name: values.sum()}, count_of(name, counts, divisors))
        self.add_by_teacher(names, batch, terms, divisors)

    def add_by_teacher(
        self,
        names: Sequence[str],
        batch: Mapping[str, Tensor],
        terms: Mapping[str, Tensor],
        divisors: Mapping[str, str],
    ) -> None:
        """Add the terms `[N]` of a batch's trained tokens, and their number, by teacher: as `divergence/math`.

        Args:
            names: of several teachers; with none, nothing is added.
            divisors: as in `losses.reduction`.
        """
        if not names:
            return
        owners, count = owners_of(batch["labels"], batch[TEACHER_INDEX], len(names)), len(names) + 1
        ones = torch.ones_like(owners, dtype=torch.float32)
        tokens = sum_per_row(ones, owners, count)
        self.add_sums(**{f"trained_tokens/{teacher}": tokens[k] for k, teacher in enumerate(names)})
        for name, values in terms.items():
            totals, counts = sum_per_row(values.float(), owners, count), tokens
            if name in divisors:
                entry = batch[divisors[name]][:, 1:][trained_mask(batch["labels"])]
                counts = sum_per_row(entry.float(), owners, count)
            for k, teacher in enumerate(names):
                self.add_means({f"{name}/{teacher}": totals[k]}, counts[k])

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return sums and means over all processes since the last read; everyone must call it."""
        totals, counts = sorted(self._totals), sorted(self._counts)
        histograms, size = sorted(self._histograms), len(totals) + len(counts)
        values = torch.stack([self._totals[name] for name in totals] + [self._counts[name] for name in counts])
        binned = [self._histograms[name] for name in histograms]
        reduced = accelerator.reduce(torch.cat([values, *binned]), reduction="sum")
        read, bins = reduced[:size].tolist(), reduced[size:].view(-1, 2 * _BINS + 1).cpu()
        for kept in (self._totals, self._counts, self._histograms):
            kept.clear()
        means = means_of_totals(
            dict(zip(totals, read, strict=False)), dict(zip(counts, read[len(totals) :], strict=True))
        )
        return means | {
            f"{name}_p{round(100 * share):02}": _quantile(counts_of, share)
            for name, counts_of in zip(histograms, bins, strict=True)
            for share in (0.05, 0.95)
            if counts_of.any()
        }


class StepMeans(RunningMetrics):
    """Running metrics, some of which are wanted after each optimiser step too.

    Args:
        followed: names of means that `read_step` gives.
    """

    def __init__(self, device: torch.device, followed: tuple[str, ...]):
        super().__init__(device)
        self.followed = followed
        self._step: dict[str, Tensor] = {}

    def add_means(self, totals: Mapping[str, Tensor | float], count: Tensor | float) -> None:
        super().add_means(totals, count)
        for name in totals.keys() & set(self.followed):
            _add(self._step, {name: totals[name], f"{name}/count": count}, self.device)

    def read_step(self, accelerator: Accelerator) -> dict[str, float]:
        """Return means over all processes since the last call; everyone must call it."""
        names = sorted(self._step)
        read = accelerator.reduce(torch.stack([self._step[name] for name in names]), reduction="sum").tolist()
        sums = dict(zip(names, read, strict=True))
        self._step.clear()
        totals = {name: sums[name] for name in self.followed if name in sums}
        return means_of_totals(totals, {name: sums[f"{name}/count"] for name in totals})


def _quantile(counts: Tensor, share: float) -> float:
    """Return the middle of the bin at which so large a share of the counts is reached."""
    cumulative = counts.cpu().double().cumsum(0)
    place = int(torch.searchsorted(cumulative, share * cumulative[-1]))
    return math.exp(math.sinh((place - _BINS) / _BINS_PER_UNIT) / _FINE)


def _add(totals: dict[str, Tensor], values: Mapping[str, Tensor | float], device: torch.device) -> None:
    for name, value in values.items():
        value = torch.as_tensor(value, device=device).to(torch.float32)
        totals[name] = totals[name] + value if name in totals else value
