"""When a step is on-policy, and the randomness of its rollouts.

Both depend on the seed and the step alone, so that a resumed run draws what the uninterrupted one drew, and so that
all processes take the same branch: under ZeRO-3 and FSDP a process that generates alone waits for the others forever.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import torch


def mix(*numbers: int) -> int:
    """Mix several numbers into a seed in [0, 2**63)."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**63


def draws_on_policy(lmbda: float, seed: int, step: int) -> bool:
    """Tell whether step `step` trains on student rollouts: with probability λ (GKD, arXiv 2306.13649, Alg. 1)."""
    return random.Random(mix(seed, step)).random() < lmbda


@contextlib.contextmanager
def rollout_rng(seed: int, step: int, rank: int, device: torch.device | None = None) -> Iterator[None]:
    """Set torch's random state for the rollouts of one step on one process; the state outside stays as it was."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(mix(seed, step, rank, 1))
        yield
