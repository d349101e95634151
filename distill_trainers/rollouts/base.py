"""What every rollout engine offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..exceptions import ConfigurationError
from ..randomness import Stream
from ..servers.openai import Written
from .sampling import SamplingSettings, up_to_eos


class Completions(list[list[int]]):
    """Completions as lists of ids, and what their sampler thought of each token.

    Attributes:
        logps: a list for each completion, as long as it; None where the engine does not tell.
        processed: whether they are of the distribution that was drawn from, after temperature and filters; else of the
            model's own at temperature 1.
    """

    def __init__(self, ids: Iterable[list[int]], logps: list[list[float]] | None = None, processed: bool = True):
        super().__init__(ids)
        self.logps, self.processed = logps, processed

    def drawn_logps(self, sampling: SamplingSettings) -> list[list[float]] | None:
        """Return log-probabilities of the distribution that was drawn from; None where these are not known."""
        return self.logps if self.processed or not sampling.changes_distribution else None


def completions_of(
    written: Sequence[Written], sampling: SamplingSettings, processed: bool | None = None
) -> Completions:
    """Cut completions at their first end; log-probabilities of an unknown kind are left out."""
    ids = [up_to_eos(list(row.ids), sampling.eos_token_ids) for row in written]
    logps = [row.logps[: len(kept)] for row, kept in zip(written, ids, strict=True) if row.logps is not None]
    whole = processed is not None and len(logps) == len(ids)
    return Completions(ids, logps if whole else None, bool(processed))


def check_room(prompts: Sequence[Sequence[int]], sampling: SamplingSettings, longest: int | None, where: str) -> None:
    """Refuse prompts whose completions the engine would cut short without a word.

    Raises:
        ConfigurationError: with the length that it takes.
    """
    most = max(map(len, prompts), default=0) + sampling.max_new_tokens
    if longest is not None and most > longest:
        raise ConfigurationError(
            f"Got prompts that come to {most} tokens with `max_new_tokens: {sampling.max_new_tokens}`, but {where} "
            f"takes {longest}. Raise its `max_model_len`, or lower `max_new_tokens` or `max_length`."
        )


class RolloutEngine(ABC):
    """Samples one completion for each prompt.

    Attributes:
        runs_the_model: whether `generate` needs the model unwrapped and whole (see `models.generating`).
        processed: see `Completions`; None of an engine that does not tell log-probabilities, or of which kind.
    """

    runs_the_model: ClassVar[bool] = True
    processed: bool | None = True

    @abstractmethod
    def generate(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: SamplingSettings,
        streams: Sequence[Stream] | None = None,
    ) -> Completions:
        """Sample from `model` as it is now.

        Args:
            model: a causal LM in eval mode; ready to be run if the engine `runs_the_model`.
            prompt_ids, prompt_mask: `[B, P]`, padded on the left.
            streams: the random numbers of each prompt; needed at a temperature above 0.

        Returns:
            B lists of ids without padding, up to and including the first EOS or stop string.
        """
