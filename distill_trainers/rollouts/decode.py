"""A decode loop that stops working for rows which have ended.

`generate` runs every row of a batch until the longest one ends. Here finished rows leave the batch and the KV cache,
the cache grows in place, prompts of different lengths are read apart, so that little padding is, and padding of the
vocabulary is cut off before it is processed. The law of what is sampled
is that of `generate`; the random numbers are drawn per prompt, so a completion does not depend on its batch mates.

A second model may have its say in every token (`Mixture`), and the log-probabilities of what was drawn may be kept
(`decode_scored`): policy gradients need the sampler's own, not those of a later forward.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from transformers import GenerationMixin

from .. import models
from ..signals import Head
from .cache import can_join, droppable_cache, join, keep_rows
from .sampling import SamplingSettings, Stops, draw_tokens, logits_processors, stop_function, trim_left

Run = Callable[[Tensor, Tensor | None, Tensor, Any], Tensor]

# Rows are dropped once this share of the batch has ended: doing so copies the cache of the others.
_WORTH_DROPPING = 1 / 8
# Prompts are read together down to this share of the longest one's length.
_ALIKE = 3 / 4


def why_not_decodable(model: Any) -> str | None:
    """What keeps `decode_completions` from running `model`, in words; None where nothing does."""
    if models.must_stay_in_step(model):
        return "its weights are sharded over processes, which must all run equally many forwards"
    return why_not_scored(model)


def why_not_scored(model: Any) -> str | None:
    """What keeps `decode_scored`, which can also keep step with other processes, from running `model`; or None."""
    causal_lm: Any = models.causal_lm_of(model)
    if models.is_encoder_decoder(model):
        return f"{type(causal_lm).__name__} is an encoder-decoder"
    if models.is_peft(model) and model.active_peft_config.is_prompt_learning:
        return "its adapter prepends virtual tokens"
    if type(causal_lm).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return f"{type(causal_lm).__name__} prepares its inputs for generation in a way of its own"
    if not {"input_ids", "attention_mask", "past_key_values"} <= _parameters(causal_lm):
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
    tokenizer: Any = None,
) -> list[list[int]]:
    """Sample one completion for each prompt.

    Args:
        model: an unwrapped causal LM in eval mode (see `models.generating`), which `why_not_decodable` accepts.
        prompt_ids, prompt_mask: `[B, P]`, padded on the left.
        batch_size: prompts that are decoded together, those of similar length; None takes all. What is sampled does
            not depend on it.
        tokenizer: only needed for stop strings.

    Returns:
        B lists of ids, up to and including the first EOS or stop string.
    """
    return [each.ids for each in _decode_all(model, prompt_ids, prompt_mask, sampling, batch_size, tokenizer)]


@dataclass(frozen=True)
class Mixture:
    """Tokens are drawn from `alpha` * (model) + (1 - `alpha`) * (the student), 0 < alpha < 1; both keep a KV cache.

    Args:
        model: unwrapped and in eval mode, of the student's vocabulary; `why_not_scored` accepts it.
    """

    model: Any
    alpha: float


@dataclass(frozen=True)
class Scored:
    """A completion of L tokens and log-probabilities of them, in nats.

    Args:
        ids: L ids.
        logps: `[L, K]`: under the student at temperature 1, without filters; as drawn, so with temperature, filters and
            mixture; and, of a mixture, under its other model at temperature 1. None where they were not kept.
    """

    ids: list[int]
    logps: Tensor | None = None


@torch.no_grad()
def decode_scored(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: SamplingSettings,
    batch_size: int | None = None,
    *,
    tokenizer: Any = None,
    mixture: Mixture | None = None,
) -> list[Scored]:
    """As `decode_completions`, token for token without a mixture, with log-probabilities of what was drawn.

    Models that are sharded over processes run too: all processes then take as many steps as the longest row of any of
    them. They must come with equally many prompts each.
    """
    how = {"mixture": mixture, "scored": True}
    return _decode_all(model, prompt_ids, prompt_mask, sampling, batch_size, tokenizer, **how)


def _decode_all(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: SamplingSettings,
    batch_size: int | None,
    tokenizer: Any,
    **how: Any,
) -> list[Scored]:
    uniforms = None
    if sampling.temperature > 0:
        precise = torch.float32 if prompt_ids.device.type == "mps" else torch.float64  # which MPS has not
        shape = (len(prompt_ids), sampling.max_new_tokens)
        uniforms = torch.rand(shape, dtype=precise, device=prompt_ids.device)
    stops = stop_function(sampling, tokenizer)
    completions: list[Scored] = [Scored([]) for _ in range(len(prompt_ids))]
    order = prompt_mask.sum(dim=1).argsort(descending=True, stable=True)  # the longest first, as `_Rows` expects
    for places in order.split(batch_size or len(order)) if len(order) else ():
        ids, mask = trim_left(prompt_ids[places], prompt_mask[places])
        rows = _Rows(ids, mask.long(), None if uniforms is None else uniforms[places])
        for place, completion in zip(places.tolist(), _decode(model, rows, sampling, stops, **how), strict=True):
            completions[place] = completion
    return completions


class _Rows:
    """The rows still being written, and all that belongs to them. n rows, P prompt positions, T positions so far.

    Args:
        ids, mask: `[n, P]`, padded on the left, the longest first.
        uniforms: `[n, max_new_tokens]`, or None to take the most likely tokens.
    """

    def __init__(self, ids: Tensor, mask: Tensor, uniforms: Tensor | None):
        self.prompt_width = ids.shape[1]
        self.places = list(range(len(ids)))
        first = ids.gather(1, mask.argmax(dim=1, keepdim=True))
        self.ids = torch.where(mask.bool(), ids, first)  # [n, T]; padding must not count as a token that was said
        self.inputs = ids
        self.mask: Tensor | None = mask
        self.positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        self.uniforms = uniforms
        self.ends = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)  # 0: not yet
        self.logps: Tensor | None = None  # [n, T − P, K], where they are kept
        self._forget_full_mask()

    def alike(self) -> list[tuple[slice, slice]]:
        """Rows and positions of prompts that are of similar length."""
        if self.mask is None:
            return [(slice(None), slice(None))]
        lengths = self.mask.sum(dim=1).tolist()
        starts = [0]
        for row, length in enumerate(lengths):
            if length < _ALIKE * lengths[starts[-1]]:
                starts.append(row)
        ends = [*starts[1:], len(lengths)]
        return [(slice(s, e), slice(self.prompt_width - lengths[s], None)) for s, e in zip(starts, ends, strict=True)]

    @property
    def new_ids(self) -> Tensor:
        """`[n, T − P]`"""
        return self.ids[:, self.prompt_width :]

    def append(self, tokens: Tensor, eos: Tensor, stops: Stops | None) -> None:
        """Write one token `[n]` to each row, and note the rows that it ends."""
        self.ids = torch.cat([self.ids, tokens.unsqueeze(1)], dim=1)
        self.inputs = tokens.unsqueeze(1)
        self.positions = self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        ended = torch.isin(tokens, eos)
        if stops is not None:
            ended = ended | stops(self.new_ids)
        self.ends = torch.where((self.ends == 0) & ended, self.new_ids.shape[1], self.ends)

    def score(self, logps: Tensor) -> None:
        """Keep log-probabilities `[n, K]` of the tokens that are appended next."""
        logps = logps.unsqueeze(1)
        self.logps = logps if self.logps is None else torch.cat([self.logps, logps], dim=1)

    def completions(self) -> dict[int, Scored]:
        """What was written so far, by the rows' places in the batch."""
        length = self.new_ids.shape[1]
        ends = [end or length for end in self.ends.tolist()]
        logps = [None] * len(ends) if self.logps is None else list(self.logps.cpu())
        written = zip(self.places, self.new_ids.tolist(), logps, ends, strict=True)
        return {place: Scored(ids[:end], None if kept is None else kept[:end]) for place, ids, kept, end in written}

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.places = [self.places[row] for row in rows]
        index = torch.tensor(rows, device=self.ids.device)
        for name in ("ids", "inputs", "mask", "positions", "uniforms", "ends", "logps"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[index])
        self._forget_full_mask()

    def _forget_full_mask(self) -> None:
        if self.mask is not None and bool(self.mask.all()):
            self.mask = None  # without one, attention takes its faster kernels


def _decode(
    model: Any,
    rows: _Rows,
    sampling: SamplingSettings,
    stops: Stops | None,
    mixture: Mixture | None = None,
    scored: bool = False,
) -> list[Scored]:
    """One completion for each of `rows`."""
    voices = [model] if mixture is None else [model, mixture.model]
    in_step = scored and any(map(models.must_stay_in_step, voices))
    processors, runs = logits_processors(sampling), [_runner(voice, exact=scored) for voice in voices]
    eos = torch.tensor(sampling.eos_token_ids, dtype=torch.int64, device=rows.ids.device)
    ended: dict[int, Scored] = {}
    read = [_read_prompts(voice, rows, run, whole=in_step) for voice, run in zip(voices, runs, strict=True)]
    logits, caches = [each for each, _ in read], [cache for _, cache in read]
    for step in range(sampling.max_new_tokens):
        if step:
            inputs = (rows.inputs, rows.mask, rows.positions)
            logits = [run(*inputs, cache) for run, cache in zip(runs, caches, strict=True)]
        uniforms = None if rows.uniforms is None else rows.uniforms[:, step]
        logits = [each[:, : sampling.suppress_from] for each in logits]
        scores = _mixed([processors(rows.ids, each) for each in logits], mixture)
        tokens = draw_tokens(scores, uniforms)
        if scored:
            rows.score(_token_logps(logits, scores, tokens))
        rows.append(tokens, eos, stops)
        running = [row for row, end in enumerate(rows.ends.tolist()) if end == 0]
        if not (_anybody_runs(running, rows.ids.device) if in_step else running):
            break
        if running and len(rows.places) - len(running) >= max(1.0, _WORTH_DROPPING * len(rows.places)):
            ended |= rows.completions()  # of running rows too, overwritten in the end
            rows.keep(running)
            for cache in caches:
                keep_rows(cache, running)
    ended |= rows.completions()
    return [ended[place] for place in sorted(ended)]


def _mixed(scores: list[Tensor], mixture: Mixture | None) -> Tensor:
    """The logits that tokens are drawn from: the student's own, or log(alpha * p + (1 - alpha) * q)."""
    if mixture is None:
        return scores[0]
    student, other = (each.log_softmax(-1) for each in scores)
    return torch.logaddexp(student + math.log1p(-mixture.alpha), other + math.log(mixture.alpha))


def _token_logps(logits: list[Tensor], scores: Tensor, tokens: Tensor) -> Tensor:
    """`[n, K]` as in `Scored`: student, as drawn, other model."""

    def of(each: Tensor) -> Tensor:
        return each.gather(1, tokens.unsqueeze(1)).squeeze(1) - each.logsumexp(-1)

    student = of(logits[0])
    drawn = student if scores is logits[0] else of(scores)
    return torch.stack([student, drawn, *(of(each) for each in logits[1:])], dim=1)


def _anybody_runs(running: list[int], device: torch.device) -> bool:
    """Whether any process still has rows to write; all must ask."""
    count = torch.tensor(len(running), device=device)
    torch.distributed.all_reduce(count)
    return bool(count)


def _read_prompts(model: Any, rows: _Rows, run: Run, whole: bool = False) -> tuple[Tensor, Any]:
    """The logits that follow each prompt, `[n, V]`, and the cache of all prompts; `whole`: by one forward."""

    def empty() -> Any:
        return droppable_cache(models.causal_lm_of(model).config.get_text_config(decoder=True))

    parts = rows.alike() if can_join(empty()) and not whole else [(slice(None), slice(None))]
    logits, caches = [], []
    for some, positions in parts:
        mask = None if rows.mask is None else rows.mask[some, positions]
        mask = None if mask is None or bool(mask.all()) else mask
        caches.append(empty())
        logits.append(run(rows.inputs[some, positions], mask, rows.positions[some, positions], caches[-1]))
    return torch.cat(logits), caches[0] if len(caches) == 1 else join(caches)


def _runner(model: Any, exact: bool = False) -> Run:
    """`run(ids, mask, positions, cache)`: logits `[n, V]` of the last position, at least float32 (`generate`'s).

    `exact`: with the head's product in float32, as losses take it, where the model itself would round its logits to
    bfloat16: a ratio of the student to itself is then 1 but for what rounding does to its hidden states.
    """
    accepted = _parameters(models.causal_lm_of(model))
    exact = exact and models.gives_hidden_states(model)

    def run(ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        some: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        some = {name: value for name, value in some.items() if name in accepted}
        if exact:
            some = {**some, "on_hidden": _wide_logits}
            some.pop("logits_to_keep", None)
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **some)
        logits = output if exact else output.logits[:, -1]
        return logits.to(device=ids.device, dtype=torch.promote_types(logits.dtype, torch.float32))

    return run


def _wide_logits(hidden: Tensor, head: Head) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return head.logits(hidden[:, -1])


def _parameters(causal_lm: Any) -> set[str]:
    return set(inspect.signature(causal_lm.forward).parameters)
