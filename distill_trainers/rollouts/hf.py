"""Completions sampled with `generate` of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .. import models
from ..exceptions import ConfigurationError
from ..randomness import Stream
from .base import Completions
from .draws import uniforms_of
from .sampling import (
    PADDING,
    SamplingSettings,
    Stops,
    draw_tokens,
    logits_processors,
    logps_of_draws,
    stop_function,
    trim_left,
    up_to_eos,
)


@torch.no_grad()
def generate_completions(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: SamplingSettings,
    batch_size: int | None = None,
    *,
    streams: Sequence[Stream] | None = None,
    tokenizer: Any = None,
) -> Completions:
    """Do as `decode_completions`, for any causal LM; `batch_size` prompts go into one call of `generate`.

    Completions are cut by position and never by the pad id, so that an EOS which also serves as padding stays.

    Raises:
        ConfigurationError: the model has a `generate` of its own, which chooses other tokens than were drawn.
    """
    uniforms = uniforms_of(streams, len(prompt_ids), sampling, prompt_ids.device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # `_Draws` draws; `generate` takes the likeliest token of what is left
        use_cache=True,
        eos_token_id=sampling.eos_token_ids or None,
        pad_token_id=sampling.pad_token_id,
        decoder_start_token_id=models.decoder_start(models.causal_lm_of(model).config),
    )
    stops = stop_function(sampling, tokenizer)
    synced = models.must_stay_in_step(model)  # by itself, generate does not see FSDP2 as accelerate sets it up
    completions, logps = list[list[int]](), list[list[float]]()
    with _own_settings_only(model):
        for start in range(0, len(prompt_ids), batch_size or max(1, len(prompt_ids))):
            rows = slice(start, start + (batch_size or len(prompt_ids)))
            ids, mask = trim_left(prompt_ids[rows], prompt_mask[rows])
            begin = 1 if models.is_encoder_decoder(model) else ids.shape[1]  # behind the decoder's start, or the prompt
            ends = _Ends(stops, ids, begin)
            padding = mask == 0 if begin > 1 else torch.zeros_like(ids[:, :1], dtype=torch.bool)
            draws = _Draws(sampling, padding, None if uniforms is None else uniforms[rows])
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([draws]),
                stopping_criteria=StoppingCriteriaList([ends] if stops else []),
                synced_gpus=synced,
            )
            new = output[:, begin:].tolist()
            cut = [row[:end] for row, end in zip(new, ends.lengths.tolist(), strict=True)]
            written = [up_to_eos(row, sampling.eos_token_ids) for row in cut]
            draws.check(model, written)
            completions += written
            logps += draws.logps_of(written)
    return Completions(completions, logps)


class _Draws(LogitsProcessor):
    """Leaves each row the one token that it draws by its own random numbers, as the decode loop draws it.

    Args:
        padding: `[n, P]`, where the ids that `generate` starts from are padding.
        uniforms: `[n, max_new_tokens]`, or None to take the most likely tokens.
    """

    def __init__(self, sampling: SamplingSettings, padding: Tensor, uniforms: Tensor | None):
        self.sampling, self.padding, self.uniforms = sampling, padding, uniforms
        self.processors = logits_processors(sampling)
        self.drawn: list[Tensor] = []
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        start, step = self.padding.shape[1], len(self.drawn)
        ids = torch.cat([input_ids[:, :start].masked_fill(self.padding, PADDING), input_ids[:, start:]], dim=1)
        logits = self.processors(ids, scores[:, : self.sampling.suppress_from])
        self.drawn.append(draw_tokens(logits, None if self.uniforms is None else self.uniforms[:, step]))
        self.logps.append(logps_of_draws(logits, self.drawn[-1]))
        return torch.full_like(scores, -torch.inf).scatter(1, self.drawn[-1].unsqueeze(1), 0.0)

    def logps_of(self, completions: list[list[int]]) -> list[list[float]]:
        """Return log-probabilities of the tokens of each completion, as they were drawn."""
        logps = torch.stack(self.logps, dim=1).tolist() if self.logps else [[] for _ in completions]
        return [row[: len(ids)] for ids, row in zip(completions, logps, strict=True)]

    def check(self, model: Any, completions: list[list[int]]) -> None:
        """Refuse a `generate` that did not take the drawn tokens: it would sample otherwise than it is told to."""
        drawn = torch.stack(self.drawn, dim=1).tolist() if self.drawn else [[] for _ in completions]
        if any(ids != row[: len(ids)] for ids, row in zip(completions, drawn, strict=True)):
            raise ConfigurationError(
                f"Got a {type(models.causal_lm_of(model)).__name__} whose own `generate` does not take the tokens that "
                "its logits processors leave; expected that of transformers. Sampling settings and seeds would not act "
                "on it. Set `rollout_engine: decode`, or give the model transformers' `generate`."
            )


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
