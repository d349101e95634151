"""Several completions of one prompt: each row comes to a step as often as `num_generations` says, in a row.

Nothing else of the path knows of it. Copies are rows like others, each sampled by random numbers of its own. A group
may lie in several micro-batches and processes; who needs it whole gathers it by what the rows hold.
"""

from __future__ import annotations

from typing import Any

from ...exceptions import ConfigurationError, DatasetError
from ...requirements import Requirements


def check_groups(args: Any, num_processes: int) -> None:
    """Refuse steps that would break a group apart.

    Raises:
        ConfigurationError: with the numbers.
    """
    if args.per_device_train_tokens is not None:
        return  # the copies of a row are in one batch
    size, micro_batches = args.num_generations, args.gradient_accumulation_steps
    rows = args.per_device_train_batch_size * micro_batches * num_processes
    if rows % size:
        raise ConfigurationError(
            f"Got `num_generations: {size}` with {rows} rows in a step (per_device_train_batch_size "
            f"{args.per_device_train_batch_size} × gradient_accumulation_steps {micro_batches} × {num_processes} "
            "processes); expected a multiple of it, since batches count completions. Change one of them."
        )


def check_group_rows(args: Any, train: Any, wants: Requirements) -> None:
    """Refuse rows that cannot be repeated.

    Raises:
        DatasetError: a stream.
    """
    if args.num_generations > 1 and train is not None and wants.streams_rows:
        raise DatasetError(
            f"Got a stream with `num_generations: {args.num_generations}`; expected a `datasets.Dataset`, whose rows "
            "come several times in a row, or 1."
        )
