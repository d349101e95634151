"""Several rows in one: how a dataset is packed, and how a packed batch becomes rows again.

A packed row has `seq_lengths`, and in a batch `position_ids` `[B, T]` that start anew where a row begins; there is no
`attention_mask`, and padding is a row of its own (see `models/inputs.py`). Nothing predicts the first token of a row.

Shapes: B packed rows of T positions, R rows in them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distill_trainers.data.labels import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)


def is_packed_dataset(dataset: Any) -> bool:
    """Tell whether `pack` has made a dataset."""
    return "seq_lengths" in (getattr(dataset, "column_names", None) or [])


def count_rows(dataset: Any) -> int | None:
    """Count the rows of a dataset, each of a packed one; None for a stream."""
    if not hasattr(dataset, "__len__"):
        return None
    return sum(map(len, dataset["seq_lengths"])) if is_packed_dataset(dataset) else len(dataset)


def pack(dataset: Dataset | IterableDataset, max_length: int, batch_size: int = 1) -> Dataset | IterableDataset:
    """Pack tokenised rows, best fit by decreasing length, into rows of at most `max_length` tokens.

    Args:
        batch_size: rows of a batch, to tell how much padding is saved.
    """
    from trl import pack_dataset

    tokens = dataset.select_columns(["input_ids", "labels"])
    if not hasattr(dataset, "__len__"):
        return pack_dataset(tokens, max_length)
    packed = pack_dataset(tokens, max_length, map_kwargs={"desc": "Packing rows"})
    before, after = (list(map(len, part["input_ids"])) for part in (tokens, packed))
    logger.warning(
        "Packed %d rows into %d of at most %d tokens: a step of as many batches takes %.1f times as many rows, and "
        "%.0f %% of the batches are padding instead of %.0f %%.",
        len(before),
        len(after),
        max_length,
        len(before) / len(after),
        100 * padding_share(after, batch_size),
        100 * padding_share(before, batch_size),
    )
    return packed.add_column("length", after)


def rows_of_packed(packed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a packed one."""
    ends = list(itertools.accumulate(packed["seq_lengths"], initial=0))
    names = ("input_ids", "labels")
    return [{name: packed[name][a:b] for name in names} for a, b in itertools.pairwise(ends)]


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Return how much of batches is padding, each as long as its longest row, if rows come in this order."""
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / max(1, sum(max(batch) * len(batch) for batch in batches))


def restarts(position_ids: Tensor) -> Tensor:
    """Return bool `[B, T]`: where a row of a packed batch begins."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    return begins


def positions_of(lengths: Sequence[Sequence[int]], width: int) -> Tensor:
    """Return the `position_ids` `[B, width]` of packed rows; padding counts from 0 as well."""
    rows = [[*row, width - sum(row)] for row in lengths]
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def unpacked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Cut a packed batch into its rows, `[R, T']`, in order and padded on the right; other batches stay as they are.

    Every entry `[B, T]` is cut; `attention_mask` takes the place of `position_ids`.
    """
    if "position_ids" not in batch or "attention_mask" in batch:
        return dict(batch)
    shape, begins = batch["input_ids"].shape, restarts(batch["position_ids"])
    lengths = begins.flatten().nonzero()[:, 0].diff(append=begins.new_tensor([begins.numel()], dtype=torch.long))
    sizes = lengths.tolist()
    cut = dict(batch)
    del cut["position_ids"]
    for name, value in cut.items():
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            fill = IGNORED if name == "labels" else 0
            cut[name] = pad_sequence(value.flatten(0, 1).split(sizes), batch_first=True, padding_value=fill)
    width = cut["input_ids"].shape[1]
    cut["attention_mask"] = (torch.arange(width, device=lengths.device) < lengths[:, None]).long()
    return cut
