"""Filling a teacher's cache ahead of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...exceptions import ConfigurationError
from ...losses.reduction import trained_mask
from ...teachers.rows import dataset_row_key, examples_of
from ..protocol import Run


def fill_cache(run: Run, batch_size: int | None = None) -> dict[str, int]:
    """Ask the teacher for all training and evaluation rows that its cache lacks; processes share them.

    Args:
        batch_size: rows per forward of the teacher; by default `per_device_eval_batch_size`.

    Returns:
        numbers: `rows` that training and evaluation need, `computed` by all processes, `tokens` in the cache.

    Raises:
        ConfigurationError: the run has no teacher cache, or its data is a stream.
        CacheError: the cache cannot be written.
    """
    teacher, accelerator = run.teacher, run.accelerator
    store = teacher.store
    if store is None:
        raise ConfigurationError("No teacher cache was named; set `teacher_cache` to a folder.")
    datasets = _datasets(run)
    if not all(hasattr(dataset, "__len__") for dataset in datasets):
        raise ConfigurationError(
            "A stream cannot be cached ahead of training, since nobody knows its rows. Train with `teacher_cache`, "
            "which records each row as it comes, or leave `streaming` out."
        )
    accelerator.wait_for_everyone()
    store.refresh()
    todo: list[tuple[int, Any, int]] = []
    needed: set[bytes] = set()
    missing: set[bytes] = set()
    for dataset in datasets:
        for number, rows in enumerate(examples_of(dataset)):
            keys = {key for key, count in map(dataset_row_key, rows) if count}
            new = {key for key in keys - missing if key not in store}
            if new:
                todo.append((max(len(row["input_ids"]) for row in rows), dataset, number))
            needed |= keys
            missing |= new
    accelerator.wait_for_everyone()  # nobody writes before all know what is missing
    size = batch_size or run.args.per_device_eval_batch_size
    longest_first = sorted(todo, key=lambda job: -job[0])
    batches = [longest_first[i : i + size] for i in range(0, len(longest_first), size)]
    _ask_for(run, batches)
    teacher.flush()
    accelerator.wait_for_everyone()
    store.refresh()
    return {"rows": len(needed), "computed": len(missing), "tokens": store.num_tokens}


def _ask_for(run: Run, batches: list[Any]) -> None:
    """Each process takes every so-manieth batch; a sharded teacher is asked equally often by all of them."""
    world, rank = run.accelerator.num_processes, run.accelerator.process_index
    for turn in tqdm(range(-(-len(batches) // world)), desc="Teacher cache", disable=rank != 0):
        place = turn * world + rank
        if place >= len(batches) and not run.teacher.is_collective:
            break
        chosen = batches[min(place, len(batches) - 1)]
        batch = run.data_collator([dataset[number] for _, dataset, number in chosen])
        inputs = {name: value.to(run.args.device) for name, value in batch.items() if isinstance(value, Tensor)}
        with torch.no_grad(), run.two_models.autocast():
            run.two_models.signal(inputs, trained_mask(inputs["labels"]))


def _datasets(run: Run) -> list[Any]:
    """Training and evaluation rows as they will be trained on: with the teacher's completions where they are due."""
    datasets = []
    if run.train_dataset is not None:
        datasets.append(run.get_train_dataloader().dataset)
    evaluated = run.eval_dataset
    for name in evaluated if isinstance(evaluated, dict) else [None] if evaluated is not None else []:
        datasets.append(run.get_eval_dataloader(name).dataset)
    return datasets
