"""What happened since the last log, over all micro-batches and processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...losses.reduction import means_of_totals

if TYPE_CHECKING:
    from accelerate import Accelerator


class RunningMetrics:
    """Sums and means by name; nothing waits for the device, and no process for another, until `read`.

    All processes must add the same names between two reads. A mean is a total over a count, so that rows of any length
    on any process weigh alike; a mean of nothing is left out.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._totals)

    def add_sums(self, **values: Tensor | float) -> None:
        """Add to quantities whose sum is of interest."""
        _add(self._totals, values, self.device)

    def add_means(self, totals: Mapping[str, Tensor | float], count: Tensor | float) -> None:
        """Add totals over the same `count` of things, whose mean is of interest."""
        _add(self._totals, totals, self.device)
        _add(self._counts, dict.fromkeys(totals, count), self.device)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return sums and means over all processes since the last read; everyone must call it."""
        totals, counts = sorted(self._totals), sorted(self._counts)
        values = torch.stack([self._totals[name] for name in totals] + [self._counts[name] for name in counts])
        read = accelerator.reduce(values, reduction="sum").tolist()
        self._totals.clear()
        self._counts.clear()
        return means_of_totals(
            dict(zip(totals, read, strict=False)), dict(zip(counts, read[len(totals) :], strict=True))
        )


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


def _add(totals: dict[str, Tensor], values: Mapping[str, Tensor | float], device: torch.device) -> None:
    for name, value in values.items():
        value = torch.as_tensor(value, device=device).to(torch.float32)
        totals[name] = totals[name] + value if name in totals else value
