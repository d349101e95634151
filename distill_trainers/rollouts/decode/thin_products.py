"""Products of a few rows with a large matrix, which is what decoding on a CPU spends its time on.

With one to four rows in float32, `weight @ rows.T` reads the weight once, where `rows @ weight.T` copies it into
another layout first: 1.3 to 4 times the time (measured with MKL; with eight rows and more both are alike).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType

import torch
from torch import Tensor, nn

_FEW = 4  # rows


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `rows @ weight.T + bias`, `[..., K]` with `[N, K]` to `[..., N]`, the faster way round where known."""
    count = rows.shape[:-1].numel()
    thin = 0 < count <= _FEW and rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32
    if not thin or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(rows, weight, bias)
    flat = rows.reshape(count, -1)
    if count == 1:
        flat = flat.repeat(2, 1)  # a single vector takes a slower kernel than two
    product = (weight @ flat.T)[:, :count].T.contiguous()
    return (product if bias is None else product.add_(bias)).view(*rows.shape[:-1], -1)


@contextlib.contextmanager
def thin_products(model: nn.Module) -> Iterator[None]:
    """Let, within it, the plain linear layers of `model` take their products by `linear`."""

    def forward(self: nn.Linear, rows: Tensor) -> Tensor:
        return linear(rows, self.weight, self.bias)

    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in module.__dict__]
    for layer in layers:
        layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
