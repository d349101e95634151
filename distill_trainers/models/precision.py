"""Which dtype this machine multiplies in faster: measured, since a processor's flags do not tell.

Some processors list AVX-512 with bfloat16 and still multiply faster in float32; one without took seven times as long.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

TYPICAL = (768, 2048)  # hidden and intermediate size, where the model's own are not known yet, and at most
_TOKENS = 64
_SECONDS = 0.1
_GAIN = 1.1  # bfloat16 rounds to 8 bits, so it has to be clearly faster


@dataclass(frozen=True)
class Products:
    """How fast a feed-forward layer is computed, forward and backward, with its weights in float32.

    Attributes:
        float32, bfloat16: GFLOP/s in float32, and under autocast in bfloat16.
    """

    float32: float
    bfloat16: float

    @property
    def narrow(self) -> bool:
        """Whether bfloat16 pays: it is faster by a tenth or more."""
        return self.bfloat16 > _GAIN * self.float32

    def __str__(self) -> str:
        return f"{self.float32:.0f} GFLOP/s in float32, {self.bfloat16:.0f} in bfloat16"


@functools.lru_cache(maxsize=8)
def measure_products(hidden_size: int, intermediate_size: int) -> Products:
    """Multiply for about a tenth of a second on the CPU, in turns, and keep the best turn of each dtype.

    Of each dtype there are two turns or more, so that a first one, which makes kernels, does not count alone. Wider
    models are measured as 768 by 2,048: a processor that has no bfloat16 would take seconds for more.
    """
    hidden_size, intermediate_size = min(hidden_size, TYPICAL[0]), min(intermediate_size, TYPICAL[1])
    text = torch.ones(_TOKENS, hidden_size, requires_grad=True)
    up = torch.ones(intermediate_size, hidden_size, requires_grad=True)
    down = torch.ones(hidden_size, intermediate_size, requires_grad=True)
    best = {False: float("inf"), True: float("inf")}
    turns, started = 0, time.perf_counter()
    while turns < 2 or time.perf_counter() - started < _SECONDS:
        for narrow in best:
            turn = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow), torch.enable_grad():
                out = functional.linear(functional.linear(text, up), down)
            torch.autograd.grad(out, (text, up, down), torch.ones_like(out))
            best[narrow] = min(best[narrow], time.perf_counter() - turn)
        turns += 1
    operations = (
        3 * 2 * 2 * _TOKENS * hidden_size * intermediate_size
    )  # forward, two gradients; two layers; 2 a product
    return Products(*(operations / best[narrow] / 1e9 for narrow in (False, True)))


def products_of(config: Any) -> Products:
    """Measure with the widths of a model's config; typical ones where it does not name them."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(config, "hidden_size", None)
    inner = getattr(config, "intermediate_size", None) or (4 * hidden if isinstance(hidden, int) else None)
    return measure_products(*((hidden, inner) if isinstance(hidden, int) and isinstance(inner, int) else TYPICAL))
