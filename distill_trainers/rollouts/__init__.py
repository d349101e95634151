"""Rollouts: completions sampled from a model, and when to use them."""

from .base import Completions, RolloutEngine
from .completing import Alone, CompletionSettings, complete_prompts
from .decode.loop import decode_completions, decode_scored, why_not_scored
from .decode.mixture import Mixture
from .decode.rows import Scored
from .draws import draws_on_policy
from .engines import (
    ENGINES,
    DecodeEngine,
    HfEngine,
    build_engine,
    check_engine,
    local_engine,
)
from .hf import generate_completions
from .replay import AdaptiveProbability, ReplayBuffer
from .sampling import SamplingSettings
from .store import CompletionStore
from .vllm import VllmEngine

__all__ = [
    "ENGINES",
    "AdaptiveProbability",
    "Alone",
    "CompletionSettings",
    "CompletionStore",
    "Completions",
    "DecodeEngine",
    "HfEngine",
    "Mixture",
    "ReplayBuffer",
    "RolloutEngine",
    "SamplingSettings",
    "Scored",
    "VllmEngine",
    "build_engine",
    "check_engine",
    "complete_prompts",
    "decode_completions",
    "decode_scored",
    "draws_on_policy",
    "generate_completions",
    "local_engine",
    "why_not_scored",
]
