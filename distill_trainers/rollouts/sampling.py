"""How completions are sampled: the settings, the distribution of one next token, and where a completion ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..exceptions import ConfigurationError

Stops = Callable[[Tensor], Tensor]

# Stands for padding among the ids that logits processors read: no token, beyond every vocabulary. Those of transformers
# pass over such ids, and no n-gram of text holds one.
PADDING = 2**31 - 1


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled.

    Args:
        max_new_tokens: longest completion.
        temperature: of the sampling distribution; 0 takes the most likely token.
        top_p, top_k, min_p: nucleus, top-k and min-p filters; 1.0, 0 and 0.0 are off, as an unbiased on-policy
            expectation needs.
        eos_token_ids: a completion ends after the first of them.
        pad_token_id: fills finished rows.
        suppress_from: ids from here on are padding of the vocabulary and never sampled.
        repetition_penalty: divides positive and multiplies negative logits of all tokens that the prompt or the
            completion already holds (CTRL, arXiv 1909.05858); 1.0 is off.
        stop_strings: a completion also ends with the token that completes one of them; the token is kept.
        no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and completion; 0 is off. Not for vLLM.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eos_token_ids: list[int] = field(default_factory=list)
    pad_token_id: int = 0
    suppress_from: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_strings: list[str] = field(default_factory=list)
    no_repeat_ngram_size: int = 0

    @property
    def changes_distribution(self) -> bool:
        """Whether tokens are drawn from another distribution than the model's own at temperature 1.

        Greedy tokens count as drawn from the model's own: of the one that is all on them there is nothing to say.
        """
        filters = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return self.reads_text or (self.temperature > 0 and (self.temperature != 1 or filters))

    @property
    def reads_text(self) -> bool:
        """Whether that distribution depends on the text itself, beside the model's logits."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0

    def as_dict(self) -> dict[str, Any]:
        """Return all settings; one that came later is left out where it is off, so that older records are found."""
        settings = asdict(self)
        if not self.no_repeat_ngram_size:
            del settings["no_repeat_ngram_size"]
        return settings


def logits_processors(sampling: SamplingSettings):
    """List the processors, in transformers' own order, that turn the model's logits into those to sample from.

    Returns:
        a `LogitsProcessorList`, called with the ids so far `[n, T]`, `PADDING` where there is no token, and logits
        `[n, V]`. Padding of the vocabulary is to be cut off before.
    """
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if sampling.temperature == 0:
        return processors
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors


def logps_of_draws(scores: Tensor, tokens: Tensor) -> Tensor:
    """Return log-probabilities `[n]` of drawn tokens `[n]` under the processed logits `[n, V]`."""
    return scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scores.logsumexp(-1)


def draw_tokens(scores: Tensor, uniforms: Tensor | None) -> Tensor:
    """Draw a token for each row: the first at which the cumulative distribution exceeds the row's uniform number.

    A row's token depends on its own scores and number alone, whatever else is in the batch. Probabilities are summed
    as integers, in units of 2⁻⁵⁰: exact in whatever order a device adds, so repeatable, and without the rare tokens
    that float32 would round away beside a sum near 1.

    Args:
        scores: processed logits `[n, V]`; −inf is never drawn.
        uniforms: `[n]` in [0, 1); None takes the most likely token.

    Returns:
        ids `[n]`.
    """
    if uniforms is None:
        return scores.argmax(dim=-1)
    cumulative = (scores.softmax(dim=-1) * 2.0**50).long().cumsum(dim=-1)
    total = cumulative[:, -1:]
    thresholds = (uniforms.unsqueeze(1) * total).long().minimum(total - 1)
    drawn = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1)
    return drawn.clamp_(max=scores.shape[-1] - 1)  # of NaN scores, so that the loss gets to tell


def stop_function(sampling: SamplingSettings, tokenizer: Any) -> Stops | None:
    """Return what tells which of `[n, t]` new tokens just completed a stop string; None without any.

    Prompts are not looked at, so one that happens to end in half a stop string changes nothing.

    Raises:
        ConfigurationError: there are stop strings but no tokenizer.
    """
    if not sampling.stop_strings:
        return None
    if tokenizer is None:
        raise ConfigurationError(
            f"Got stop_strings {sampling.stop_strings} without a tokenizer; expected one to match them with. "
            "Give the engine `tokenizer=…`."
        )
    from transformers import StopStringCriteria

    try:
        criteria = StopStringCriteria(tokenizer, list(sampling.stop_strings))
    except ValueError as error:  # it spells some letters with the tokenizer, and looks for them
        raise ConfigurationError(
            f"transformers cannot match stop_strings with the vocabulary of {type(tokenizer).__name__} ({error}). "
            "End completions by an EOS token instead."
        ) from error
    return lambda new_ids: criteria(new_ids, None)


def trim_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop columns of `[B, P]` in which every row is padding."""
    used = mask.any(dim=0).nonzero()
    first = int(used[0]) if len(used) else 0
    return ids[:, first:], mask[:, first:]


def pad_left(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Stack prompts into ids and mask `[B, P]`, padded on the left."""
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the rows of `pad_left` as lists again."""
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    return [[token for token, real in zip(*row, strict=True) if real] for row in rows]


def join_prompts(prompts: Sequence[tuple[Tensor, Tensor]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Join left-padded (ids, mask) pairs `[B, P]` of several batches into one."""
    width = max(ids.shape[1] for ids, _ in prompts)
    ids = [torch.nn.functional.pad(ids, (width - ids.shape[1], 0), value=pad_token_id) for ids, _ in prompts]
    masks = [torch.nn.functional.pad(mask, (width - mask.shape[1], 0), value=0) for _, mask in prompts]
    return torch.cat(ids), torch.cat(masks)


def up_to_eos(ids: list[int], eos_token_ids: list[int]) -> list[int]:
    """Return `ids` up to and including the first EOS."""
    for position, token in enumerate(ids):
        if token in eos_token_ids:
            return ids[: position + 1]
    return ids
