"""The teacher's own completions for a dataset's prompts: generated once, kept on disk, read ever after."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .. import models
from ..exceptions import ConfigurationError
from ..rollouts import CompletionStore, SamplingSettings, generate_completions, rollout_rng
from ..rollouts.store import prompt_key
from ..teachers import LocalTeacher

if TYPE_CHECKING:
    from .base import DistillTrainer

logger = logging.getLogger(__name__)

_BATCH = 16


def fill_with_teacher_completions(trainer: DistillTrainer, dataset: Any, *, replace: bool) -> Any:
    """`dataset` with the teacher's completions where it has none, or everywhere with `replace`.

    Every process generates its share; what is on disk already is not generated again.
    """
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or "loss_mask" not in columns or not hasattr(dataset, "__len__"):
        return dataset
    if getattr(trainer, "_filled", None) is None:
        trainer._filled = {}  # type: ignore[attr-defined]
    known = trainer._filled  # type: ignore[attr-defined]
    if id(dataset) in known:
        return known[id(dataset)][1]
    prompts = {}
    for row in dataset:
        if replace or not any(row["loss_mask"]):
            ids = row["input_ids"][: row["prompt_length"]]
            prompts.setdefault(prompt_key(ids), ids)
    filled = dataset
    if prompts:
        completions = _generate_missing(trainer, prompts)
        filled = dataset.map(
            _with_completion, fn_kwargs={"completions": completions, "replace": replace}, desc="Teacher completions"
        )
    known[id(dataset)] = (dataset, filled)  # the key stays valid while the dataset is held
    known[id(filled)] = (filled, filled)
    return filled


def _with_completion(row: dict[str, Any], completions: dict[str, list[int]], replace: bool) -> dict[str, Any]:
    prompt = row["input_ids"][: row["prompt_length"]]
    completion = completions.get(prompt_key(prompt))
    if completion is None or (any(row["loss_mask"]) and not replace):
        return row
    ids, mask = prompt + completion, [0] * len(prompt) + [1] * len(completion)
    return {**row, "input_ids": ids, "loss_mask": mask, "length": len(ids)}


def _generate_missing(trainer: DistillTrainer, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    teacher, accelerator, args = trainer.teacher, trainer.accelerator, trainer.args
    if not isinstance(teacher, LocalTeacher):
        raise ConfigurationError(
            f"{type(teacher).__name__} cannot generate completions. Give the dataset completions, or use a local teacher."
        )
    sampling = _teacher_sampling(trainer)
    identity = {"teacher": teacher.fingerprint(), "seed": args.seed, **sampling.as_dict()}
    root = Path(args.completions_dir or Path(args.output_dir) / "completions")
    store = CompletionStore(root, identity, accelerator.process_index)
    accelerator.wait_for_everyone()
    done = store.load()
    missing = sorted((k for k in prompts if k not in done), key=lambda k: (-len(prompts[k]), k))
    if missing:
        logger.info("Generating %d completions with the teacher (kept in %s).", len(missing), store.folder)
        _generate(trainer, {k: prompts[k] for k in missing}, sampling, store.append)
    accelerator.wait_for_everyone()
    return store.load()


def _teacher_sampling(trainer: DistillTrainer) -> SamplingSettings:
    """The rollout's settings with the teacher's own end-of-text tokens."""
    eos = models.eos_ids(trainer.teacher.model, trainer.processing_class)  # type: ignore[attr-defined]
    values = {**trainer.sampling.as_dict(), "eos_token_ids": eos}
    return SamplingSettings(**values)


def _generate(
    trainer: DistillTrainer,
    prompts: dict[str, list[int]],
    sampling: SamplingSettings,
    keep: Callable[[list[tuple[str, list[int]]]], None],
) -> None:
    """Generate in batches of similar prompt length. All processes run equally many batches, for sharded teachers."""
    accelerator, keys = trainer.accelerator, list(prompts)
    world, rank, pad = accelerator.num_processes, accelerator.process_index, sampling.pad_token_id
    batches = [keys[i : i + _BATCH] for i in range(0, len(keys), _BATCH)]
    rounds = -(-len(batches) // world)
    with models.generating(trainer.teacher.model, accelerator) as model:  # type: ignore[attr-defined]
        for index in tqdm(range(rounds), desc="Teacher completions", disable=rank != 0):
            mine = index * world + rank
            batch = batches[min(mine, len(batches) - 1)]
            width = max(len(prompts[k]) for k in batch)
            ids = [[pad] * (width - len(prompts[k])) + prompts[k] for k in batch]
            mask = [[0] * (width - len(prompts[k])) + [1] * len(prompts[k]) for k in batch]
            tensors = (torch.tensor(x, device=accelerator.device) for x in (ids, mask))
            # The seed follows from the prompts, so an interrupted run and a whole one draw alike.
            with rollout_rng(trainer.args.seed, int(batch[0][:12], 16), 0, accelerator.device):
                completions = generate_completions(model, *tensors, sampling)
            if mine < len(batches):
                keep(list(zip(batch, completions, strict=True)))
