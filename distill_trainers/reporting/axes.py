"""Scales, ticks and numbers of the charts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Choose about `wanted` round numbers (1, 2 or 5 times a power of ten) that enclose [low, high]."""
    if not high > low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if rough <= factor * power * 1.0001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if abs(i * step) < 1e6 else i * step for i in range(first, last + 1)]


def short(value: float | None) -> str:
    """Write a number for an axis or a label: four digits at most."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            divisor = 1e3 if letter == "k" else limit
            return f"{value / divisor:.4g}{letter}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Scale:
    """From values to places in a drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, -0.02), 1.02) * (self.end - self.start), 1)


def spread(values: Iterable[float], *, zero: bool = False) -> tuple[float, float]:
    """Return smallest and largest of the values; with `zero`, 0 counts among them."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    return (min(0.0, *finite), max(0.0, *finite)) if zero else (min(finite), max(finite))
