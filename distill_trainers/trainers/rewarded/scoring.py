"""Rewards of a step's completions: what functions make of them, compared within the groups of all processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...answers.checkers import Sample
from ...data.collator import DistillCollator, unpadded_prompts
from ...data.reward_rows import REWARD_ROW, read_row
from ...exceptions import BAD_INPUT, ConfigurationError, DatasetError, RewardError
from ...losses.reduction import IGNORE_INDEX
from ...losses.rewards import group_advantages, spread_of_groups
from ...rewards.calling import reward_values, totals
from ...rewards.functions import RewardFunction, reward_functions
from ..lifecycle.outage import keep_finished_step
from ..protocol import Batch, Run
from .settings import RewardSettings

ADVANTAGE = "token_advantage"  # the batch entry [B, T]: that of the row, on its sampled tokens


class Rewards:
    """Rewards the completions of a run.

    Args:
        run: its config has `RewardSettings`.

    Raises:
        ConfigurationError: a data collator of the user's, whose batches do not hold what functions read.
    """

    def __init__(self, run: Run):
        self.run = run
        self.args = cast(RewardSettings, run.args)
        self.functions = reward_functions(self.args.reward_names)
        self.weights = self.args.reward_weights or [1.0] * len(self.functions)
        if not isinstance(run.data_collator, DistillCollator):
            raise ConfigurationError(
                f"Got the data collator {getattr(run.data_collator, 'name', type(run.data_collator).__name__)} with "
                "`reward_funcs`, which read columns of each row; expected none, or DistillCollator. Leave it out."
            )

    def added_to(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return sampled batches with `ADVANTAGE`, and log their rewards; all processes must call it at once.

        Raises:
            RewardError: on all of them, if a function failed on any; the last finished step is saved before.
        """
        if not all(REWARD_ROW in batch for batch in batches):
            raise DatasetError(
                "Got training rows that are tokenised already, without the columns that reward functions read; "
                "expected raw rows. Pass the dataset as it was before."
            )
        known = [row for batch in batches for row in batch[REWARD_ROW]]
        prompts = [ids for batch in batches for ids in unpadded_prompts(batch)]
        completions = [ids for batch in batches for ids in completions_of(batch)]
        values, failure = self._valued(known, prompts, completions)
        keys = [group_key(*pair) for pair in zip(prompts, known, strict=True)]
        every = gather_object([(failure, keys, totals(values, self.weights) if not failure else [])])
        self._refuse_failures([told for told, _, _ in every])
        rank = self.run.accelerator.process_index
        start = sum(len(keys) for _, keys, _ in every[:rank])
        rewards = _with_nan([value for _, _, of_rank in every for value in of_rank])
        groups = numbered([key for _, of_rank, _ in every for key in of_rank])
        advantages = group_advantages(rewards, groups, self.args.advantage, self.args.scale_rewards)
        own = slice(start, start + len(keys))
        self._log(values, rewards[own], spread_of_groups(rewards, groups)[groups][own])
        return _with_advantages(batches, advantages[own])

    def _valued(
        self, known: Sequence[str], prompts: Sequence[list[int]], completions: Sequence[list[int]]
    ) -> tuple[list[list[float | None]], str]:
        """Values `[functions][samples]`, and what went wrong: others must hear of it before anyone raises."""
        try:
            return self.valued_by(self.functions, known, prompts, completions), ""
        except (RewardError, *BAD_INPUT) as error:
            return [], str(error)

    def valued_by(
        self,
        functions: Sequence[RewardFunction],
        known: Sequence[str],
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
    ) -> list[list[float | None]]:
        """Call functions on completions, given as ids: values `[functions][samples]`.

        Args:
            known: what `RewardRows` wrote of each sample's row.

        Raises:
            RewardError: see `reward_values`.
        """
        decode = self.run.processing_class.decode
        rows = [read_row(row) for row in known]
        texts = [str(decode(ids, skip_special_tokens=True)) for ids in completions]
        asked = [decode(ids) if prompt is None else prompt for (prompt, _), ids in zip(rows, prompts, strict=True)]
        columns = {name: [row.get(name) for _, row in rows] for name in {name for _, row in rows for name in row}}
        told = {
            **columns,
            "prompts": asked,
            "completions": [_as_asked(*pair) for pair in zip(texts, asked, strict=True)],
            "completion_ids": [list(ids) for ids in completions],
            "trainer_state": self.run.state,
        }
        samples = [self._sample(text, ids, row) for text, ids, (_, row) in zip(texts, completions, rows, strict=True)]
        checked = {"samples": samples}
        count, seconds = len(rows), self.args.reward_timeout
        return [reward_values(f, checked if f.is_checker else told, count, seconds) for f in functions]

    def _sample(self, text: str, ids: Sequence[int], row: Mapping[str, Any]) -> Sample:
        answer, choices = row.get(self.args.reward_answer_column), row.get("choices")
        choices = choices if isinstance(choices, list) else []
        return Sample(text, len(ids), None if answer is None else str(answer), [str(choice) for choice in choices])

    def _refuse_failures(self, failures: Sequence[str]) -> None:
        failed = [failure for failure in failures if failure]
        if failed:
            raise RewardError(f"{failed[0]} {keep_finished_step(self.run)}")

    def _log(self, values: Sequence[Sequence[float | None]], rewards: Tensor, spread: Tensor) -> None:
        known = ~rewards.isnan()
        shown = {"reward_mean": rewards.nansum(), "reward_std": (spread * known).sum()}
        shown["reward_flat_groups"] = ((spread == 0) & known).sum()
        self.run.metrics.add_means(shown, known.sum())
        self.run.metrics.add_means({"reward_unknown": (~known).sum()}, len(rewards))
        for function, of_function in zip(self.functions, values, strict=True):
            found = [value for value in of_function if value is not None]
            self.run.metrics.add_means({f"rewards/{function.name}": float(sum(found))}, len(found))


def completions_of(batch: Batch) -> list[list[int]]:
    """Return the sampled completions of a batch as lists of ids."""
    lengths, ends = batch["prompt_mask"].sum(1).tolist(), batch["attention_mask"].sum(1).tolist()
    return [ids[start:end] for ids, start, end in zip(batch["input_ids"].tolist(), lengths, ends, strict=True)]


def group_key(prompt: Sequence[int], known: str) -> str:
    """Name the group of a sample: rows with the same prompt and the same columns are one."""
    return hashlib.sha256(f"{list(prompt)}\n{known}".encode()).hexdigest()


def numbered(keys: Sequence[str]) -> Tensor:
    """Number groups from 0 on, in the order in which they come: int64 `[R]`."""
    places = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([places[key] for key in keys], dtype=torch.int64)


def without_reward_rows(batch: Batch) -> Batch:
    """Return a batch as models read it."""
    return {name: entry for name, entry in batch.items() if name != REWARD_ROW}


def _with_nan(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([torch.nan if value is None else value for value in values], dtype=torch.float64)


def _as_asked(text: str, asked: Any) -> Any:
    """A completion as TRL gives it: a message where the prompt is a conversation."""
    return [{"role": "assistant", "content": text}] if isinstance(asked, list) else text


def _with_advantages(batches: Sequence[Batch], advantages: Tensor) -> list[Batch]:
    scored, start = [], 0
    for batch in batches:
        labels = batch["labels"]
        of_rows = advantages[start : start + len(labels)].to(labels.device, torch.float32)
        start += len(labels)
        entry = torch.where(labels != IGNORE_INDEX, of_rows[:, None], 0)
        scored.append({**without_reward_rows(batch), ADVANTAGE: entry})
    return scored
