"""When a step is on-policy, and the random numbers that tokens are drawn by.

Both follow from named streams (`randomness`): a resumed run draws what the uninterrupted one drew, and all processes
take the same branch. Under ZeRO-3 and FSDP a process that generates alone waits for the others forever.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..randomness import Purpose, Role, Stream
from .sampling import SamplingSettings


def draws_on_policy(lmbda: float, seed: int, step: int) -> bool:
    """Tell whether step `step` trains on student rollouts: with probability λ (GKD, arXiv 2306.13649, Alg. 1)."""
    return bool(Stream(seed, Role.RUN, Purpose.ON_POLICY).at(step=step).numpy_generator().random() < lmbda)


def uniforms_of(
    streams: Sequence[Stream] | None, rows: int, sampling: SamplingSettings, device: torch.device
) -> Tensor | None:
    """Return the numbers by which each row draws its tokens, `[rows, max_new_tokens]`; None of greedy rows.

    They are made on the host, so that every device draws by the same.

    Args:
        streams: one for each row.

    Raises:
        ValueError: rows are to be sampled, but have no streams: their tokens would depend on who drew before.
    """
    if sampling.temperature == 0:
        return None
    if streams is None or len(streams) != rows:
        raise ValueError(
            f"Got {'no' if streams is None else len(streams)} streams of random numbers for {rows} prompts at "
            f"temperature {sampling.temperature}; expected one for each, as in "
            "`streams=[Stream(seed, role, purpose).at(row=i) for i in range(rows)]`."
        )
    numbers = np.array([stream.numpy_generator().random(sampling.max_new_tokens) for stream in streams])
    precise = torch.float32 if device.type == "mps" else torch.float64  # which MPS has not
    return torch.from_numpy(numbers.reshape(rows, sampling.max_new_tokens)).to(precise).to(device)
