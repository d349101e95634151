"""What every rollout engine offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..randomness import Stream
from .sampling import SamplingSettings


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
    ) -> Completions:
        """Sample from `model` as it is now.

        Args:
            model: a causal LM in eval mode; ready to be run if the engine `runs_the_model`.
            prompt_ids, prompt_mask: `[B, P]`, padded on the left.
            streams: the random numbers of each prompt; needed at a temperature above 0.

        Returns:
            B lists of ids without padding, up to and including the first EOS or stop string.
        """
