"""Rollouts: completions sampled from a model, and when to use them."""

from .hf import SamplingSettings, generate_completions
from .mixing import draws_on_policy, rollout_rng
from .store import CompletionStore

__all__ = ["CompletionStore", "SamplingSettings", "draws_on_policy", "generate_completions", "rollout_rng"]
