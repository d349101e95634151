"""Completions sampled with `generate` of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .. import models
from .sampling import SamplingSettings, Stops, stop_function, trim_left, up_to_eos


@torch.no_grad()
def generate_completions(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: SamplingSettings,
    batch_size: int | None = None,
    *,
    tokenizer: Any = None,
) -> list[list[int]]:
    """Do as `decode_completions`, for any causal LM; `batch_size` prompts go into one call of `generate`.

    Completions are cut by position and never by the pad id, so that an EOS which also serves as padding stays.
    """
    config = sampling.generation_config(vocab_rows=models.logit_rows(model))
    config.decoder_start_token_id = models.decoder_start(models.causal_lm_of(model).config)
    stops = stop_function(sampling, tokenizer)
    synced = models.must_stay_in_step(model)  # by itself, generate does not see FSDP2 as accelerate sets it up
    completions: list[list[int]] = []
    with _own_settings_only(model):
        for start in range(0, len(prompt_ids), batch_size or max(1, len(prompt_ids))):
            rows = slice(start, start + (batch_size or len(prompt_ids)))
            ids, mask = trim_left(prompt_ids[rows], prompt_mask[rows])
            begin = 1 if models.is_encoder_decoder(model) else ids.shape[1]  # behind the decoder's start, or the prompt
            ends = _Ends(stops, ids, begin)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([ends] if stops else []),
                synced_gpus=synced,
            )
            new = output[:, begin:].tolist()
            cut = [row[:end] for row, end in zip(new, ends.lengths.tolist(), strict=True)]
            completions += [up_to_eos(row, sampling.eos_token_ids) for row in cut]
    return completions


class _Ends(StoppingCriteria):
    """Stops rows at a stop string, and remembers where each one ended: the padding that follows does not tell."""

    def __init__(self, stops: Stops | None, prompt_ids: Tensor, prompt_width: int):
        self.stops = stops
        self.prompt_width = prompt_width
        self.lengths = prompt_ids.new_full((len(prompt_ids),), torch.iinfo(torch.int64).max)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        assert self.stops is not None
        new = input_ids[:, self.prompt_width :]
        done = self.stops(new)
        self.lengths = torch.where(done, self.lengths.clamp(max=new.shape[1]), self.lengths)
        return done


@contextlib.contextmanager
def _own_settings_only(model: Any) -> Iterator[None]:
    """Hide the model's own generation config, which `generate` would take for everything that ours leaves open."""
    causal_lm = models.causal_lm_of(model)
    before, causal_lm.generation_config = causal_lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        causal_lm.generation_config = before
