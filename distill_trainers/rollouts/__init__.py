"""Rollouts: completions sampled from a model, and when to use them."""

from .decode import decode_completions
from .engines import (
    ENGINES,
    DecodeEngine,
    HfEngine,
    RolloutEngine,
    VllmEngine,
    build_engine,
    check_engine,
    local_engine,
)
from .hf import generate_completions
from .mixing import draws_on_policy, rollout_rng
from .replay import AdaptiveProbability, ReplayBuffer
from .sampling import SamplingSettings
from .store import CompletionStore

__all__ = [
    "ENGINES",
    "AdaptiveProbability",
    "CompletionStore",
    "DecodeEngine",
    "HfEngine",
    "ReplayBuffer",
    "RolloutEngine",
    "SamplingSettings",
    "VllmEngine",
    "build_engine",
    "check_engine",
    "decode_completions",
    "draws_on_policy",
    "generate_completions",
    "local_engine",
    "rollout_rng",
]
