"""Prompts completed in batches, each kept as it is done: what was stopped goes on, what is there is not asked again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from .draws import rollout_rng
from .engines import DecodeEngine, RolloutEngine
from .sampling import SamplingSettings

logger = logging.getLogger(__name__)

_DEFAULT_BATCH = 16


Prompts = dict[str, list[int]]


class KeptCompletions(Protocol):
    """Where completions are kept by prompt key: a `CompletionStore`, or `InMemory`."""

    folder: Any

    def load(self) -> dict[str, list[int]]: ...

    def append(self, completions: Iterable[tuple[str, list[int]]]) -> None: ...


class InMemory:
    """Keeps completions of a model that is about to change, for as long as they are looked at."""

    folder = "memory"

    def __init__(self) -> None:
        self.completions: dict[str, list[int]] = {}

    def load(self) -> dict[str, list[int]]:
        return self.completions

    def append(self, completions: Iterable[tuple[str, list[int]]]) -> None:
        self.completions |= dict(completions)


def complete_prompts(
    prompts: Prompts,
    store: KeptCompletions,
    sampling: SamplingSettings,
    generating: AbstractContextManager[Any],
    *,
    seed: int,
    device: torch.device,
    batch_size: int | None = None,
    world: int = 1,
    rank: int = 0,
    engine: RolloutEngine | None = None,
    title: str = "Teacher completions",
    progress: bool = True,
    wait_for_everyone: Callable[[], None] = lambda: None,
) -> None:
    """Generate what the store lacks, in batches of similar prompt length, and keep each batch as it is done.

    All processes run equally many batches, because a sharded teacher generates only when all processes do. Where they
    share the store, `wait_for_everyone` keeps the first from writing until the last knows what is missing.
    """
    done = store.load()
    wait_for_everyone()
    keys = sorted((k for k in prompts if k not in done), key=lambda k: (-len(prompts[k]), k))
    size = batch_size or _DEFAULT_BATCH
    engine = engine or DecodeEngine()
    batches = [keys[i : i + size] for i in range(0, len(keys), size)]
    if not batches:
        return
    logger.info("%s: generating %d (kept in %s).", title, len(keys), store.folder)
    pad = sampling.pad_token_id
    with generating as model:
        for index in tqdm(range(-(-len(batches) // world)), desc=title, disable=rank != 0 or not progress):
            mine = index * world + rank
            batch = batches[min(mine, len(batches) - 1)]
            width = max(len(prompts[k]) for k in batch)
            ids = torch.tensor([[pad] * (width - len(prompts[k])) + prompts[k] for k in batch], device=device)
            mask = torch.tensor([[0] * (width - len(prompts[k])) + [1] * len(prompts[k]) for k in batch], device=device)
            with rollout_rng(seed, int(batch[0][:12], 16), 0, device):  # the seed follows from the prompts
                completions = engine.generate(model, ids, mask, sampling)
            if mine < len(batches):
                store.append(zip(batch, completions, strict=True))
