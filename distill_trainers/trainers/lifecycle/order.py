"""The order of training rows: a function of the seed and the epoch, so that processes agree and resumed runs go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

if TYPE_CHECKING:
    from ..base import DistillTrainer


class EpochSampler(Sampler[int]):
    """Rows shuffled anew in each epoch, or grouped by length.

    transformers draws groups from the process's own random state, which is another on each process and in a resumed
    run; accelerate does not tell its shuffling sampler the epoch when several processes resume.

    Args:
        trainer: its state tells the epoch.
        rows: number of rows.
        lengths: of the rows, to group them; None only shuffles.
    """

    def __init__(self, trainer: DistillTrainer, rows: int, lengths: Sequence[int] | None = None):
        args = trainer.args
        self.trainer = trainer
        self.rows = rows
        self.lengths = lengths
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.group = args.train_batch_size * args.gradient_accumulation_steps

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + int(self.trainer.state.epoch or 0))
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


def train_sampler(trainer: DistillTrainer, dataset: Any) -> EpochSampler | None:
    """The sampler of the trainer's `train_sampling_strategy`, where it is one that draws; else None."""
    args = trainer.args
    if not hasattr(dataset, "__len__") or args.train_sampling_strategy not in ("random", "group_by_length"):
        return None
    if args.train_sampling_strategy == "random":
        return EpochSampler(trainer, len(dataset))
    if args.length_column_name in (getattr(dataset, "column_names", None) or []):
        return EpochSampler(trainer, len(dataset), list(dataset[args.length_column_name]))
    return EpochSampler(trainer, len(dataset), [len(row["input_ids"]) for row in dataset])
