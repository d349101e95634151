"""Who samples the completions: our decode loop, `generate` of transformers, or vLLM, behind one interface."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import models
from ..exceptions import ConfigurationError, refuse_unknown_keys
from ..randomness import Stream
from ..settings import require
from .decode.loop import decode_completions, why_not_decodable
from .hf import generate_completions
from .sampling import SamplingSettings, up_to_eos

logger = logging.getLogger(__name__)

ENGINES = ("decode", "hf", "vllm")

# What the trainer itself decides about vLLM.
_OWN = {"self", "model", "accelerator", "processing_class", "logprobs", "structured_outputs_regex", "generation_kwargs"}
_OWN |= {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length"}


class RolloutEngine(ABC):
    """Samples one completion for each prompt.

    Attributes:
        runs_the_model: whether `generate` needs the model unwrapped and whole (see `models.generating`).
    """

    runs_the_model: ClassVar[bool] = True

    @abstractmethod
    def generate(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: SamplingSettings,
        streams: Sequence[Stream] | None = None,
    ) -> list[list[int]]:
        """Sample from `model` as it is now.

        Args:
            model: a causal LM in eval mode; ready to be run if the engine `runs_the_model`.
            prompt_ids, prompt_mask: `[B, P]`, padded on the left.
            streams: the random numbers of each prompt; needed at a temperature above 0.

        Returns:
            B lists of ids without padding, up to and including the first EOS or stop string.
        """


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
    ) -> list[list[int]]:
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
    ) -> list[list[int]]:
        if not self._asked:
            self._asked, self._reason = True, why_not_decodable(model) or ""
            if self._reason:
                logger.info("Rollouts use `generate` of transformers, since %s.", self._reason)
        if self._reason:
            return super().generate(model, prompt_ids, prompt_mask, sampling, streams)
        given = {"streams": streams, "tokenizer": self.tokenizer}
        return decode_completions(model, prompt_ids, prompt_mask, sampling, self.batch_size, **given)


class VllmEngine(RolloutEngine):
    """vLLM, in this process or on a server, through TRL's `VLLMGeneration`, which also sends it the weights.

    `VLLMGeneration` takes one seed for all prompts of a call, by which equal prompts would get equal texts. So vLLM
    draws from torch's state, where it runs in this process: seeded here for each call, alike on the processes that
    share one model.

    Args:
        generation: a `VLLMGeneration`, built around the model that is trained.
        vocab_rows: rows of the model's output embedding.
    """

    runs_the_model = False  # TRL gathers the weights itself, one parameter after the other

    def __init__(self, generation: Any, vocab_rows: int):
        self.generation = generation
        self.vocab_rows = vocab_rows

    def generate(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: SamplingSettings,
        streams: Sequence[Stream] | None = None,
    ) -> list[list[int]]:
        for name, value in vllm_sampling(sampling, self.vocab_rows).items():
            setattr(self.generation, name, value)
        self.generation.sync_weights()
        rows = zip(prompt_ids.tolist(), prompt_mask.tolist(), strict=True)
        prompts = [[token for token, real in zip(*row, strict=True) if real] for row in rows]
        with self._draws(streams, prompt_ids.device):
            _, completions, *_ = self.generation.generate(prompts=prompts, images=None, num_generations=1)
        return [up_to_eos(list(ids), sampling.eos_token_ids) for ids in completions]

    def _draws(self, streams: Sequence[Stream] | None, device: torch.device) -> contextlib.AbstractContextManager[None]:
        if not streams:
            return contextlib.nullcontext()
        model = self.generation.accelerator.process_index // self.generation.tensor_parallel_size
        return streams[0].at(rank=model).ruling_torch(device)


def vllm_sampling(sampling: SamplingSettings, vocab_rows: int) -> dict[str, Any]:
    """Return the attributes of `VLLMGeneration` that stand for these settings."""
    extra: dict[str, Any] = {"stop_token_ids": list(sampling.eos_token_ids)}
    if sampling.stop_strings:
        extra |= {"stop": list(sampling.stop_strings), "include_stop_str_in_output": True}
    if sampling.suppress_from is not None and sampling.suppress_from < vocab_rows:
        extra["logit_bias"] = dict.fromkeys(range(sampling.suppress_from, vocab_rows), -100.0)  # vLLM's lowest
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_completion_length": sampling.max_new_tokens,
        "logprobs": None,  # TRL's own 0 has vLLM return one per token
        "generation_kwargs": extra,
    }


def check_engine(name: str, vllm_options: Mapping[str, Any] | None = None) -> None:
    """Refuse an engine that cannot run here, before anything is loaded.

    Raises:
        ConfigurationError: unknown name, vLLM not installed, or options that `VLLMGeneration` does not have.
    """
    require(name in ENGINES, "rollout_engine", name, f"one of {', '.join(ENGINES)}")
    if name != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError(
            "Got `rollout_engine: vllm`, but vLLM is not installed. Install it (`pip install trl[vllm]`), or take "
            "`rollout_engine: decode`, which needs nothing more."
        )
    from trl.generation.vllm_generation import VLLMGeneration

    known = inspect.signature(VLLMGeneration.__init__).parameters.keys() - _OWN
    refuse_unknown_keys(vllm_options or {}, known, "vllm_kwargs")


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
        vllm_options: arguments of TRL's `VLLMGeneration`, such as `{"mode": "server", "server_port": 8000}`.

    Raises:
        ConfigurationError: as `check_engine`; or vLLM is to load a student that has no folder or Hub id.
    """
    check_engine(name, vllm_options)
    if name != "vllm":
        return local_engine(name, tokenizer, batch_size)
    options = {"max_model_length": max_length, "max_num_seqs": batch_size, **(vllm_options or {})}
    if options.get("mode", "colocate") == "colocate" and not getattr(model, "name_or_path", None):
        raise ConfigurationError(
            "vLLM loads the student by its folder or Hub id, but the model was made in memory and has none. Save it "
            "with `save_pretrained` and pass the folder, or take `rollout_engine: decode`."
        )
    from trl.generation.vllm_generation import VLLMGeneration

    generation = VLLMGeneration(model=model, accelerator=accelerator, processing_class=tokenizer, **options)
    return VllmEngine(generation, vocab_rows=models.logit_rows(model))


def local_engine(name: str, tokenizer: Any, batch_size: int | None = None) -> HfEngine:
    """Build an engine for any model in this process; `decode` stands in for `vllm`, which serves only the student."""
    return HfEngine(tokenizer, batch_size) if name == "hf" else DecodeEngine(tokenizer, batch_size)
