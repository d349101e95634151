"""Completions of a step's prompts, sampled by the student through its engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Trainer

from .. import models
from ..data import replace_completions
from ..exceptions import DatasetError
from ..randomness import Purpose, Role, Stream
from ..rollouts.sampling import join_prompts
from .protocol import Batch


class Sampling(Trainer):
    """The part of a trainer that samples."""

    if TYPE_CHECKING:
        args: Any
        engine: Any
        metrics: Any
        sampling: Any
        two_models: Any
        _train_batch_size: int

    def sample_completions(self, batches: list[Batch], generate: Callable[..., Any] | None = None) -> list[Batch]:
        """Sample for all prompts of the window in one call of `generate` (the engine's), trimmed batch by batch."""
        prompts, streams = self.rollout_prompts(batches, self.state.global_step)
        ready = (
            models.generating(self.model_wrapped, self.accelerator)
            if self.engine.runs_the_model
            else contextlib.nullcontext(self.model_wrapped)
        )
        with ready as model:
            completions = (generate or self.engine.generate)(model, *prompts, self.sampling, streams)
        self.metrics.add_sums(rollouts=len(completions))
        most, ends = self.sampling.max_new_tokens, {*self.sampling.eos_token_ids}
        clipped = sum(len(ids) >= most and ids[-1] not in ends for ids in completions)
        lengths = {"completion_length": sum(map(len, completions)), "completion_clipped": clipped}
        self.metrics.add_means(lengths, len(completions))
        sampled, start = [], 0
        for batch in batches:
            rows = completions[start : start + len(batch["prompt_ids"])]
            start += len(rows)
            padding = {"pad_to_multiple_of": self.args.pad_to_multiple_of}
            written = replace_completions(batch, rows, self.sampling.pad_token_id, **padding)
            sampled.append(self.two_models.completed(written))
        return sampled

    def rollout_prompts(self, batches: list[Batch], step: int) -> tuple[tuple[Tensor, Tensor], Sequence[Stream]]:
        """Return ids and mask `[B, P]` of a window's prompts, and the random numbers of each for optimiser step `step`.

        Raises:
            DatasetError: a data collator gave none.
        """
        if not all("prompt_ids" in batch for batch in batches):
            raise DatasetError(
                "Rollouts need batches with `prompt_ids` and `prompt_mask` (padded on the left), which the data "
                f"collator did not give; got {sorted(batches[0])}. Leave `data_collator` out to use DistillCollator."
            )
        prompts = join_prompts([(b["prompt_ids"], b["prompt_mask"]) for b in batches], self.sampling.pad_token_id)
        stream = Stream(self.args.seed, Role.STUDENT, Purpose.ROLLOUT).at(step=step, rank=0)
        return prompts, [stream.at(**place) for place in self._places([len(batch["prompt_ids"]) for batch in batches])]

    def _places(self, rows: Sequence[int]) -> Iterator[dict[str, int]]:
        """Name each row of the window by where it comes in the step, whichever process has it.

        Processes take turns with batches, or with parts of them (`split_batches`). Those of more rows than the
        setting, as when tokens are counted, are named by their batch from there on.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self._train_batch_size // (world if self.accelerator.split_batches else 1)
        for micro_batch, count in enumerate(rows):
            batch = micro_batch * world + rank
            yield from ({"row": batch * size + row} for row in range(min(count, size)))
            yield from ({"batch": batch, "row": row} for row in range(size, count))
