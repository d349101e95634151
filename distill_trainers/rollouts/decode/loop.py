"""A decode loop that stops working for rows which have ended.

`generate` runs every row of a batch until the longest one ends. Here finished rows leave the batch and the KV cache,
the cache grows in place, prompts of different lengths are read apart, so that little padding is, and padding of the
vocabulary is cut off before it is processed. The law of what is sampled is that of `generate`; the random numbers are
those of a stream per prompt, so a completion does not depend on its batch mates.

A second model may have its say in every token (`Mixture`), and the log-probabilities of what was drawn may be kept
(`decode_scored`): policy gradients need the sampler's own, not those of a later forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from transformers import GenerationMixin

from ... import models
from ...randomness import Stream
from ..base import Completions
from ..draws import uniforms_of
from ..sampling import (
    SamplingSettings,
    Stops,
    draw_tokens,
    logits_processors,
    logps_of_draws,
    stop_function,
    trim_left,
)
from .forwards import parameters_of, read_prompts, runner
from .kv_cache import droppable_cache, keep_rows
from .mixture import Mixture, Partner
from .rows import Rows, Scored
from .thin_products import thin_products

# Rows are dropped once this share of the batch has ended: doing so copies the cache of the others.
_WORTH_DROPPING = 1 / 8


def why_not_decodable(model: Any) -> str | None:
    """Say what keeps `decode_completions` from running `model`; None where nothing does."""
    if models.must_stay_in_step(model):
        return "its weights are sharded over processes, which must all run equally many forwards"
    return why_not_scored(model)


def why_not_scored(model: Any) -> str | None:
    """Say what keeps `decode_scored`, which can also keep step with other processes, from running `model`; or None."""
    causal_lm: Any = models.causal_lm_of(model)
    if models.is_encoder_decoder(model):
        return f"{type(causal_lm).__name__} is an encoder-decoder"
    if models.is_peft(model) and model.active_peft_config.is_prompt_learning:
        return "its adapter prepends virtual tokens"
    if not hasattr(causal_lm, "prepare_inputs_for_generation"):
        return f"{type(causal_lm).__name__} has no `generate`"
    if type(causal_lm).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return f"{type(causal_lm).__name__} prepares its inputs for generation in a way of its own"
    if not {"input_ids", "attention_mask", "past_key_values"} <= parameters_of(causal_lm):
        return f"{type(causal_lm).__name__} takes no `past_key_values`"
    if droppable_cache(causal_lm.config.get_text_config(decoder=True)) is None:
        return f"the cache of {type(causal_lm).__name__} holds more than keys and values"
    return None


@torch.no_grad()
def decode_completions(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: SamplingSettings,
    batch_size: int | None = None,
    *,
    streams: Sequence[Stream] | None = None,
    tokenizer: Any = None,
) -> Completions:
    """Sample one completion for each prompt.

    Args:
        model: an unwrapped causal LM in eval mode (see `models.generating`), which `why_not_decodable` accepts.
        prompt_ids, prompt_mask: `[B, P]`, padded on the left.
        batch_size: prompts that are decoded together, those of similar length; None takes all. What is sampled does
            not depend on it.
        streams: the random numbers of each prompt; not needed at temperature 0.
        tokenizer: only needed for stop strings.

    Returns:
        B lists of ids, up to and including the first EOS or stop string, with log-probabilities as they were drawn.

    Raises:
        ValueError: a temperature without streams.
    """
    texts = _decode_all(model, prompt_ids, prompt_mask, sampling, batch_size, streams, tokenizer)
    logps = [[] if scored.logps is None else scored.logps[:, -1].tolist() for scored in texts]
    return Completions([scored.ids for scored in texts], logps)


@torch.no_grad()
def decode_scored(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: SamplingSettings,
    batch_size: int | None = None,
    *,
    streams: Sequence[Stream] | None = None,
    tokenizer: Any = None,
    mixture: Mixture | None = None,
) -> list[Scored]:
    """Do as `decode_completions`, token for token without a mixture, with log-probabilities of what was drawn.

    Models that are sharded over processes run too: all processes then take as many steps as the longest row of any of
    them. They must come with equally many prompts each.
    """
    return _decode_all(model, prompt_ids, prompt_mask, sampling, batch_size, streams, tokenizer, mixture, scored=True)


def _decode_all(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: SamplingSettings,
    batch_size: int | None,
    streams: Sequence[Stream] | None,
    tokenizer: Any,
    mixture: Mixture | None = None,
    scored: bool = False,
) -> list[Scored]:
    uniforms = uniforms_of(streams, len(prompt_ids), sampling, prompt_ids.device)
    coins = None
    if mixture is not None:
        if sampling.temperature != 1 or len(logits_processors(sampling)):
            raise ValueError(f"Got {sampling} with a mixture; expected temperature 1 and no filters.")
        coins = (mixture.coins.numpy_generator().random(sampling.max_new_tokens) < mixture.alpha).tolist()
    stops = stop_function(sampling, tokenizer)
    completions: list[Scored] = [Scored([]) for _ in range(len(prompt_ids))]
    order = prompt_mask.sum(dim=1).argsort(descending=True, stable=True)  # the longest first, as `Rows` expects
    for places in order.split(batch_size or len(order)) if len(order) else ():
        ids, mask = trim_left(prompt_ids[places], prompt_mask[places])
        rows = Rows(ids, mask.long(), None if uniforms is None else uniforms[places])
        with thin_products(model), thin_products(mixture.model) if mixture else contextlib.nullcontext():
            written = _decode(model, rows, sampling, stops, mixture, coins, scored)
        for place, completion in zip(places.tolist(), written, strict=True):
            completions[place] = completion
    return completions


def _decode(
    model: Any,
    rows: Rows,
    sampling: SamplingSettings,
    stops: Stops | None,
    mixture: Mixture | None = None,
    coins: list[bool] | None = None,
    scored: bool = False,
) -> list[Scored]:
    """One completion for each of `rows`. `coins`: at which steps the other model of the mixture draws."""
    voices = [model] if mixture is None else [model, mixture.model]
    in_step = scored and any(map(models.must_stay_in_step, voices))
    processors, run = logits_processors(sampling), runner(model, exact=scored)
    eos = torch.tensor(sampling.eos_token_ids, dtype=torch.int64, device=rows.ids.device)
    ended: dict[int, Scored] = {}
    (logits,), cache = read_prompts(model, rows, run, whole=in_step)
    partner = None if mixture is None else Partner(mixture, rows, sampling.suppress_from, in_step)
    for step in range(sampling.max_new_tokens):
        if step:
            (logits,) = run(rows.inputs, rows.mask, rows.positions, cache)
        logits = logits[:, : sampling.suppress_from]
        scores = processors(rows.ids, logits)
        draws_from = scores
        if partner is not None and coins is not None and (coins[step] or in_step):
            other = partner.draws_from(rows)
            draws_from = other if coins[step] else scores
        tokens = draw_tokens(draws_from, None if rows.uniforms is None else rows.uniforms[:, step])
        rows.score(_token_logps(logits, scores, tokens) if scored else logps_of_draws(scores, tokens)[:, None])
        rows.append(tokens, eos, stops)
        running = [row for row, end in enumerate(rows.ends.tolist()) if end == 0]
        if not (_anybody_runs(running, rows.ids.device) if in_step else running):
            break
        if running and len(rows.places) - len(running) >= max(1.0, _WORTH_DROPPING * len(rows.places)):
            ended |= _completions(rows, partner)  # of running rows too, overwritten in the end
            rows.keep(running)
            keep_rows(cache, running)
            if partner is not None:
                partner.keep(running)
    ended |= _completions(rows, partner)
    return [ended[place] for place in sorted(ended)]


def _token_logps(logits: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    """`[n, 2]`: log-probabilities under the model, and under the scores that it was to be drawn from."""
    model_logps = logps_of_draws(logits, tokens)
    return torch.stack([model_logps, model_logps if scores is logits else logps_of_draws(scores, tokens)], dim=1)


def _completions(rows: Rows, partner: Partner | None) -> dict[int, Scored]:
    """What was written so far, by the rows' places in the batch."""
    if partner is None or rows.logps is None:
        return rows.completions(None if rows.logps is None else rows.logps.cpu())
    model_logps, drawn = rows.logps.unbind(-1)
    other, hidden = partner.completions(rows)
    return rows.completions(torch.stack([model_logps, partner.drawn(drawn, other), other], dim=-1).cpu(), hidden)


def _anybody_runs(running: list[int], device: torch.device) -> bool:
    """Whether any process still has rows to write; all must ask."""
    count = torch.tensor(len(running), device=device)
    torch.distributed.all_reduce(count)
    return bool(count)
