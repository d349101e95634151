"""What each process holds of the trained parameters, and other values in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import unwrapped


def trained_shares(model: nn.Module) -> dict[str, Tensor]:
    """Return what this process holds of each trained parameter, by name, to be read and written in place.

    That is all of it, or its share under ZeRO-3 and FSDP2. All processes must ask: whole copies that a forward has left
    there are dropped, so that the next one gathers what the shares then say.

    Args:
        model: in its wrappers.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    optimizer: Any = getattr(model, "optimizer", None)  # of DeepSpeed's engine
    if hasattr(optimizer, "empty_partition_cache"):
        optimizer.empty_partition_cache()  # small parameters stay whole from step to step
    return {
        name: _share(parameter) for name, parameter in unwrapped(model).named_parameters() if parameter.requires_grad
    }


def _share(parameter: Any) -> Tensor:
    share = getattr(parameter, "ds_tensor", parameter).detach()
    return share.to_local() if hasattr(share, "to_local") else share


@contextlib.contextmanager
def having(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let trained parameters of `model`, within it, have other values; afterwards they are as they were, bit for bit.

    Values are copied, never exchanged: an optimiser, ZeRO and FSDP keep views of the same memory. All processes must
    enter and leave it.

    Args:
        values: by name, each of the shape of its share (`trained_shares`), in any dtype.
    """
    shares = trained_shares(model)
    before = {name: shares[name].clone() for name in values}
    try:
        _write(shares, values)
        yield
    finally:
        _write(trained_shares(model), before)


@torch.no_grad()
def _write(shares: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        shares[name].copy_(value)
