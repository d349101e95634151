"""Prompts completed in batches by all processes together; what is kept from before is not asked again."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..randomness import Purpose, Stream
from ..servers.openai import Writer
from .base import RolloutEngine
from .engines import DecodeEngine
from .sampling import SamplingSettings, pad_left
from .store import CompletionStore
from .vllm import write

logger = logging.getLogger(__name__)

_DEFAULT_BATCH = 16

Prompts = dict[str, list[int]]
Completions = dict[str, list[int]]


@dataclass(frozen=True)
class Alone:
    """Stands for an accelerator where one process works by itself, even in a launch of several."""

    device: torch.device
    num_processes: ClassVar[int] = 1
    process_index: ClassVar[int] = 0

    def wait_for_everyone(self) -> None:
        """Wait for nobody."""


@dataclass(frozen=True)
class CompletionSettings:
    """How prompts are completed. A text depends on its prompt, the model, the sampling and the stream, on nothing else.

    Args:
        stream: of the random numbers; each prompt has those of its own key within it.
        batch_size: None takes 16.
        engine: one that runs the model; it serves one model only.
    """

    sampling: SamplingSettings
    stream: Stream
    batch_size: int | None = None
    engine: RolloutEngine = field(default_factory=DecodeEngine)

    def identity(self, **writer: str) -> dict[str, Any]:
        """Tell the store of `writer`'s completions from all others, as in `identity(teacher=fingerprint)`."""
        named = self.stream.as_dict()
        if self.stream.purpose is Purpose.COMPLETION:  # so that those of earlier versions, which cost most, are found
            named = {"seed": self.stream.seed}
        return {**writer, **named, **self.sampling.as_dict()}

    def complete(self, model: Any, batch: Prompts, device: torch.device) -> Completions:
        """Complete one batch by a model that is ready to generate, or by one behind a server."""
        if isinstance(model, Writer):
            streams = [self.stream.at(prompt=key) for key in batch]
            return dict(zip(batch, write(model, list(batch.values()), self.sampling, streams), strict=True))
        ids, mask = pad_left(list(batch.values()), self.sampling.pad_token_id, device)
        streams = [self.stream.at(prompt=key) for key in batch]
        return dict(zip(batch, self.engine.generate(model, ids, mask, self.sampling, streams), strict=True))


def share_batches(
    prompts: Prompts, accelerator: Accelerator | Alone, batch_size: int | None
) -> list[tuple[Prompts, bool]]:
    """Deal out batches of similar prompt length: those that this process runs, and whether the outcome is wanted.

    All processes run equally many, because a sharded model generates only when all do.
    """
    size, world = batch_size or _DEFAULT_BATCH, accelerator.num_processes
    keys = sorted(prompts, key=lambda key: (-len(prompts[key]), key))
    batches = [{key: prompts[key] for key in keys[i : i + size]} for i in range(0, len(keys), size)]
    places = range(accelerator.process_index, -(-len(batches) // world) * world, world)
    return [(batches[min(place, len(batches) - 1)], place < len(batches)) for place in places]


def complete_prompts(
    prompts: Prompts,
    generating: AbstractContextManager[Any],
    accelerator: Accelerator | Alone,
    settings: CompletionSettings,
    store: CompletionStore | None = None,
    *,
    title: str = "Teacher completions",
    progress: bool = True,
) -> Completions:
    """Generate what the store lacks, and keep each batch as it is done.

    Args:
        generating: gives the model; entered only if a completion is missing.
        accelerator: of the processes that share the work.
        store: one per process, in the same folder; None keeps nothing.

    Returns:
        by key on every process, the completions of all prompts, among others that the store holds.
    """
    completions = {} if store is None else store.load()
    # Whoever appended before the last has looked would leave it with a shorter list, and other batches.
    accelerator.wait_for_everyone()
    missing = {key: ids for key, ids in prompts.items() if key not in completions}
    written: Completions = {}
    if missing:
        logger.info("%s: generating %d (kept in %s).", title, len(missing), store.folder if store else "memory")
        batches = share_batches(missing, accelerator, settings.batch_size)
        with generating as model:
            for batch, wanted in tqdm(batches, desc=title, disable=accelerator.process_index != 0 or not progress):
                outcome = settings.complete(model, batch, accelerator.device)
                if wanted:
                    written |= outcome
                if wanted and store is not None:
                    store.append(outcome.items())
    for part in gather_object([written]) if accelerator.num_processes > 1 else [written]:
        completions |= part
    return completions
