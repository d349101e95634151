"""Rows of a second dataset, plain text for a language-model loss, added to the batches of every optimiser step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...data import DistillCollator
from ...losses.reduction import IGNORE_INDEX
from ...randomness import Purpose, Role, Stream
from ..protocol import Batch

SHAPE = "scored_shape"  # the batch entry that holds rows and width of a batch before text was added to it


class PlainText:
    """Serves text rows to every micro-batch, in an order of their own that follows from the seed and the step.

    Args:
        rows: tokenised, with trained tokens.
        batch_rows: rows added to each micro-batch on each process.
        collator: gives batches of text.
        seed: of the order, which is another in each pass over the text.
    """

    def __init__(self, rows: Any, batch_rows: int, collator: DistillCollator, seed: int):
        self.rows = rows
        self.batch_rows = batch_rows
        self.collator = collator
        self.seed = seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, turn: int) -> list[int]:
        stream = Stream(self.seed, Role.DATA, Purpose.PLAIN_TEXT).at(turn=turn)
        return stream.numpy_generator().permutation(len(self.rows)).tolist()

    def numbers(self, step: int, accumulated: int, batch: int, world: int, rank: int) -> list[int]:
        """Tell which rows go to a micro-batch: its place in an endless row of shuffled passes."""
        first = ((step * accumulated + batch) * world + rank) * self.batch_rows
        places = (divmod(place, len(self.rows)) for place in range(first, first + self.batch_rows))
        return [self._order(turn)[place] for turn, place in places]

    def added_to(self, batches: Sequence[Batch], *, step: int, accumulated: int, world: int, rank: int) -> list[Batch]:
        """Put text below the batches' rows: `token_text` is 1 on its trained tokens, other entries are 0."""
        added = []
        for index, batch in enumerate(batches):
            numbers = self.numbers(step, accumulated, index, world, rank)
            added.append(_below(batch, self.collator([self.rows[number] for number in numbers])))
        return added


def _below(batch: Batch, text: Batch) -> Batch:
    rows, width = batch["labels"].shape
    total = max(width, text["labels"].shape[1])

    def wide(values: Tensor, fill: int) -> Tensor:
        return nn.functional.pad(values, (0, total - values.shape[1]), value=fill)

    joined: Batch = {SHAPE: (rows, width)}
    for name, value in text.items():
        if name in ("input_ids", "attention_mask", "labels"):
            fill = IGNORE_INDEX if name == "labels" else 0
            joined[name] = torch.cat([wide(batch[name], fill), wide(value, fill).to(batch[name].device)])
    for name, value in batch.items():
        if name.startswith("token_"):
            joined[name] = nn.functional.pad(value, (0, total - width, 0, len(joined["labels"]) - rows))
    is_text = torch.zeros_like(joined["labels"], dtype=torch.float32)
    is_text[rows:] = (joined["labels"][rows:] != IGNORE_INDEX).float()
    return {**batch, **joined, "token_text": is_text}
