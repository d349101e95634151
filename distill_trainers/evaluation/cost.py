"""What a model costs to run: tokens per second and memory, on the same greedy work for all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..models import num_parameters
from ..rollouts import RolloutEngine, SamplingSettings
from ..rollouts.sampling import pad_left
from .results import Cost

_MOST_PASSES = 20


def weights_mib(model: nn.Module) -> float:
    """Return the size of parameters and buffers; those that are shared count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**20


def measure_cost(
    model: Any, engine: RolloutEngine, prompts: Sequence[list[int]], sampling: SamplingSettings, device: torch.device
) -> Cost:
    """Decode all prompts together, each to `sampling.max_new_tokens` tokens: once to warm up, then by the clock.

    The fastest of at least two passes and a second counts: what else runs on the machine can only slow one down.

    Args:
        sampling: greedy and without EOS, so that all models write equally much.
    """
    ids, mask = pad_left(prompts, sampling.pad_token_id, device)
    on_cuda = device.type == "cuda"
    engine.generate(model, ids, mask, sampling)
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    passes: list[float] = []
    while len(passes) < 2 or (sum(passes) < 1.0 and len(passes) < _MOST_PASSES):
        started = time.perf_counter()
        written = sum(map(len, engine.generate(model, ids, mask, sampling)))
        if on_cuda:
            torch.cuda.synchronize(device)
        passes.append(time.perf_counter() - started)
    return Cost(
        parameters=num_parameters(model),
        weights_mib=weights_mib(model),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if on_cuda else device.type,
        tokens_per_second=written / min(passes),
        batch_size=len(prompts),
        new_tokens=sampling.max_new_tokens,
        peak_mib=torch.cuda.max_memory_allocated(device) / 2**20 if on_cuda else None,
    )
