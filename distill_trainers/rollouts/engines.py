"""Who samples the completions: our decode loop, `generate` of transformers, or vLLM, behind one interface."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..randomness import Stream
from ..settings import require
from .base import Completions, RolloutEngine
from .decode.loop import decode_completions, why_not_decodable
from .hf import generate_completions
from .sampling import SamplingSettings
from .vllm import build_vllm, split_options

logger = logging.getLogger(__name__)

ENGINES = ("decode", "hf", "vllm")


class HfEngine(RolloutEngine):
    """`generate` of transformers, at most `batch_size` prompts at a time."""

    def __init__(self, tokenizer: Any = None, batch_size: int | None = None):
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    def generate(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: SamplingSettings,
        streams: Sequence[Stream] | None = None,
    ) -> Completions:
        given = {"streams": streams, "tokenizer": self.tokenizer}
        return generate_completions(model, prompt_ids, prompt_mask, sampling, self.batch_size, **given)


class DecodeEngine(HfEngine):
    """Our decode loop; models that it cannot run go to `generate`, which is said once."""

    _asked, _reason = False, ""

    def generate(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: SamplingSettings,
        streams: Sequence[Stream] | None = None,
    ) -> Completions:
        if not self._asked:
            self._asked, self._reason = True, why_not_decodable(model) or ""
            if self._reason:
                logger.info("Rollouts use `generate` of transformers, since %s.", self._reason)
        if self._reason:
            return super().generate(model, prompt_ids, prompt_mask, sampling, streams)
        given = {"streams": streams, "tokenizer": self.tokenizer}
        return decode_completions(model, prompt_ids, prompt_mask, sampling, self.batch_size, **given)


def check_engine(name: str, vllm_options: Mapping[str, Any] | None = None, ahead: bool = False) -> None:
    """Refuse an engine that cannot run here, before anything is loaded.

    Args:
        ahead: it is to sample while the student trains.

    Raises:
        ConfigurationError: unknown name, vLLM not installed or too old, or options that it does not have.
    """
    require(name in ENGINES, "rollout_engine", name, f"one of {', '.join(ENGINES)}")
    if name == "vllm":
        options, _ = split_options(vllm_options)
        server = "server with `sample_ahead: true`: colocated, vLLM and the student take turns on one device"
        require(not ahead or options.mode == "server", "vllm_kwargs: {mode}", options.mode, server)


def build_engine(
    name: str,
    *,
    model: Any,
    accelerator: Any,
    tokenizer: Any,
    max_length: int | None,
    batch_size: int | None = None,
    vllm_options: Mapping[str, Any] | None = None,
) -> RolloutEngine:
    """Build the engine of a trainer.

    Args:
        name: one of `ENGINES`.
        model: the student, not wrapped.
        batch_size: prompts that are worked on together; None takes all of a window.
        vllm_options: `VllmOptions`, and arguments of vLLM's `LLM`, such as `{"mode": "server", "server_port": 8000}`.

    Raises:
        ConfigurationError: as `check_engine`; or vLLM is to load a student that has no folder or Hub id.
    """
    check_engine(name, vllm_options)
    if name != "vllm":
        return local_engine(name, tokenizer, batch_size)
    return build_vllm(model, accelerator, tokenizer, max_length, batch_size, vllm_options)


def local_engine(name: str, tokenizer: Any, batch_size: int | None = None) -> HfEngine:
    """Build an engine for any model in this process; `decode` stands in for `vllm`, which serves only the student."""
    return HfEngine(tokenizer, batch_size) if name == "hf" else DecodeEngine(tokenizer, batch_size)
