"""Completions sampled with `generate` of transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled.

    Args:
        max_new_tokens: longest completion.
        temperature: of the sampling distribution; 0 takes the most likely token.
        top_p, top_k: nucleus and top-k filters; 1.0 and 0 are off, as an unbiased on-policy expectation needs.
        eos_token_ids: a completion ends after the first of them.
        pad_token_id: fills finished rows.
        suppress_from: ids from here on are padding of the vocabulary and never sampled.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eos_token_ids: list[int] = field(default_factory=list)
    pad_token_id: int = 0
    suppress_from: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def generation_config(self, vocab_rows: int):
        """The equivalent `GenerationConfig`."""
        from transformers import GenerationConfig

        sampled = self.temperature > 0
        settings: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.suppress_from is not None and self.suppress_from < vocab_rows:
            settings["suppress_tokens"] = list(range(self.suppress_from, vocab_rows))
        if not sampled:
            for name in ("temperature", "top_p", "top_k"):
                settings.pop(name)
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=sampled,
            use_cache=True,
            eos_token_id=self.eos_token_ids or None,
            pad_token_id=self.pad_token_id,
            **settings,
        )


@torch.no_grad()
def generate_completions(
    model: Any, prompt_ids: Tensor, prompt_mask: Tensor, sampling: SamplingSettings, batch_size: int | None = None
) -> list[list[int]]:
    """Sample one completion for each prompt.

    Args:
        model: an unwrapped causal LM in eval mode (see `models.generating`).
        prompt_ids, prompt_mask: `[B, P]`, padded on the left.
        batch_size: prompts per call of `generate`; None takes all in one.

    Returns:
        B lists of ids: up to and including the first EOS, cut by position and never by the pad id, so that an EOS
        which also serves as padding stays.
    """
    config = sampling.generation_config(vocab_rows=model.get_output_embeddings().weight.shape[0])
    completions: list[list[int]] = []
    for start in range(0, len(prompt_ids), batch_size or max(1, len(prompt_ids))):
        rows = slice(start, start + (batch_size or len(prompt_ids)))
        ids, mask = _trim_left(prompt_ids[rows], prompt_mask[rows])
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        completions += [_up_to_eos(row, sampling.eos_token_ids) for row in output[:, ids.shape[1] :].tolist()]
    return completions


def _trim_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop columns in which every row is padding."""
    used = mask.any(dim=0).nonzero()
    first = int(used[0]) if len(used) else 0
    return ids[:, first:], mask[:, first:]


def _up_to_eos(ids: list[int], eos_token_ids: list[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in eos_token_ids:
            return ids[: position + 1]
    return ids
