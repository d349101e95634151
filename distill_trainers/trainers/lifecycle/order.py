"""The order of training rows: a function of the seed and the epoch, so that processes agree and resumed runs go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ...data.token_batches import TokenBatches
from ...exceptions import DatasetError
from ...randomness import Purpose, Role, Stream
from ..config import DistillConfig


def check_first_window(batches: int, wanted: int, args: DistillConfig) -> None:
    """Refuse training data that ends within its first optimiser step: the run would end at once, as if it had trained.

    Raises:
        DatasetError: with the numbers of batches and rows.
    """
    if batches >= wanted:
        return
    rows = args.per_device_train_batch_size * wanted * args.world_size
    raise DatasetError(
        f"The training data ended after {batches} of the {wanted} batches of the first optimiser step, so nothing was "
        f"trained. Expected at least {rows} rows that can be trained on (per_device_train_batch_size × "
        "gradient_accumulation_steps × processes). Give more rows, or lower those two; a stream does not count what it "
        "drops, so check its first rows as a Dataset (column_mapping, empty completions, max_length)."
    )


class EpochSampler(Sampler[int]):
    """Rows shuffled anew in each epoch, or grouped by length.

    transformers draws groups from the process's own random state, which is another on each process and in a resumed
    run; accelerate does not tell its shuffling sampler the epoch when several processes resume.

    Args:
        lengths: of the rows, to group them; None only shuffles.
    """

    def __init__(
        self, rows: int, args: DistillConfig, epoch: Callable[[], float], lengths: Sequence[int] | None = None
    ):
        self.rows = rows
        self.epoch = epoch
        self.lengths = lengths
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.group = args.train_batch_size * args.gradient_accumulation_steps

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + int(self.epoch()))
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


class RepeatedSampler(Sampler[int]):
    """Each row of another sampler so many times, one after the other: a group whose members a step samples apart."""

    def __init__(self, sampler: Sampler[int], times: int):
        self.sampler, self.times = sampler, times

    def __len__(self) -> int:
        return len(self.sampler) * self.times  # type: ignore[arg-type]  # those of rows that can be counted

    def __iter__(self) -> Iterator[int]:
        return (row for row in self.sampler for _ in range(self.times))


class TokenBatchSampler(Sampler[list[int]]):
    """Batches that are counted in tokens, dealt anew in each epoch; accelerate shares them among the processes.

    Args:
        times: how often a batch has each of its rows, one after the other.
    """

    def __init__(self, batches: TokenBatches, args: DistillConfig, epoch: Callable[[], float], times: int = 1):
        self.batches, self.epoch, self.times = batches, epoch, times
        self.seed = args.seed if args.data_seed is None else args.data_seed

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        stream = Stream(self.seed, Role.DATA, Purpose.TOKEN_BATCHES).at(epoch=int(self.epoch()))
        for batch in self.batches.drawn(stream.numpy_generator()):
            yield [row for row in batch for _ in range(self.times)]


def train_sampler(dataset: Any, args: DistillConfig, epoch: Callable[[], float]) -> EpochSampler | None:
    """Make the sampler of `train_sampling_strategy`, where it is one that draws; else None."""
    if not hasattr(dataset, "__len__") or args.train_sampling_strategy not in ("random", "group_by_length"):
        return None
    if args.train_sampling_strategy == "random":
        return EpochSampler(len(dataset), args, epoch)
    if "length" in (getattr(dataset, "column_names", None) or []):  # as rows get it when they are tokenised
        return EpochSampler(len(dataset), args, epoch, list(dataset["length"]))
    return EpochSampler(len(dataset), args, epoch, [len(row["input_ids"]) for row in dataset])
