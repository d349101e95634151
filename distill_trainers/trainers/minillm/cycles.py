"""One rollout batch trained on for several optimiser steps: PPO's inner epochs and minibatches.

A cycle takes the prompts of M optimiser steps at once, samples for all of them in one go, and serves the sampled rows
for E inner epochs of M steps. The first goes through the rows in the order of the data, each later one in an order of
its own. All of it follows from the seed and the step, and every process holds the same rows, so that one checkpoint
serves any number of processes and a run goes on in the middle of an inner epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Sampler

from ...data import DistillCollator
from ...data.labels import row_of
from ...data.views import with_teacher_prompt
from ...exceptions import CheckpointError, DatasetError
from ...losses.reduction import IGNORE_INDEX
from ...randomness import Purpose, Role, Stream
from ...rollouts.replay import sampled_rows
from ..protocol import Batch, Run

LOGPS = "sampled_logps"  # the batch entry `[B, T, K]` that travels with sampled rows
ROWS_PER_STEP = "rows per optimiser step"
WITHOUT_CYCLES = {"num_minibatches": 1, "num_inner_epochs": 1}


@dataclass(frozen=True)
class RolloutRow:
    """A prompt, its sampled completion of L tokens, their log-probabilities `[L, K]`, and the teacher's own prompt."""

    prompt: list[int]
    completion: list[int]
    logps: Tensor
    teacher_prompt: list[int] | None = None

    @property
    def parts(self) -> tuple[list[int], ...]:
        """Its token lists."""
        return self.prompt, *(() if self.teacher_prompt is None else (self.teacher_prompt,)), self.completion


class CycleSampler(Sampler[int]):
    """An epoch's rows in another sampler's order, those of each cycle repeated for its inner epochs.

    Repetitions only keep count of optimiser steps and epochs: what they name has been read before. Rows beyond the last
    whole optimiser step of the epoch are left out.
    """

    def __init__(self, order: Sampler[int], step_rows: int, minibatches: int, inner_epochs: int):
        self.order = order
        self.step_rows = step_rows
        self.minibatches = minibatches
        self.inner_epochs = inner_epochs

    @property
    def steps(self) -> int:
        """Optimiser steps of one pass over the data."""
        return len(self.order) // self.step_rows  # type: ignore[arg-type]  # samplers of datasets have a length

    def __len__(self) -> int:
        return self.steps * self.step_rows * self.inner_epochs

    def __iter__(self) -> Iterator[int]:
        order = list(self.order)[: self.steps * self.step_rows]
        rows = self.step_rows * self.minibatches
        for start in range(0, len(order), rows):
            for _ in range(self.inner_epochs):
                yield from order[start : start + rows]


class RolloutCycles:
    """The sampled rows of the running cycle, and where in it the run is.

    Args:
        run: its state tells the step.
        minibatches: M, optimiser steps of one inner epoch (fewer in the last cycle of an epoch).
        inner_epochs: E, how often each row is trained on.
    """

    def __init__(self, run: Run, minibatches: int, inner_epochs: int):
        self.run = run
        self.minibatches = minibatches
        self.inner_epochs = inner_epochs
        self.rows: list[RolloutRow] = []
        self.start = -1  # the optimiser step with which the cycle of `rows` begins
        self._iterator: Any = None
        self._read = 0  # steps whose batches were read from it

    def sampler(self, order: Any) -> CycleSampler:
        """Return the training sampler; `order` is the one of a run without cycles.

        Raises:
            DatasetError: there are fewer rows than one optimiser step takes.
        """
        rows = self._step_rows
        if len(order) < rows:
            raise DatasetError(
                f"Got {len(order)} training rows, but one optimiser step takes {rows} (all devices and accumulated "
                "batches), and rollouts are reused by whole steps. Add rows, or lower per_device_train_batch_size or "
                "gradient_accumulation_steps."
            )
        self._sampler = CycleSampler(order, rows, self.minibatches, self.inner_epochs)
        return self._sampler

    def next_batches(
        self, epoch_iterator: Iterator, num_batches: int, sample: Callable[[list[Batch]], list[Batch]]
    ) -> list[Batch]:
        """Return the rows of the coming optimiser step; a cycle's first step samples them for all its steps."""
        step, per_pass = self.run.state.global_step, self._sampler.steps * self.inner_epochs
        within = step % per_pass
        first = within - within % (self.minibatches * self.inner_epochs)
        steps = min(self.minibatches, self._sampler.steps - first // self.inner_epochs)
        position = within - first
        if epoch_iterator is not self._iterator:
            self._iterator, self._read = epoch_iterator, within  # a resumed run has skipped that many
        steps_ahead = first + max(steps, position + 1) - self._read
        batches = list(itertools.islice(epoch_iterator, steps_ahead * num_batches))
        self._read += steps_ahead
        if position == 0:
            self.rows, self.start = self._gathered(sample(batches), len(batches)), step
        if self.start != step - position:
            raise CheckpointError(
                f"Optimiser step {step + 1} goes on with rollouts of step {step - position + 1}, which the checkpoint "
                "does not hold: it was written with other data. Resume with the rows that it was written with."
            )
        epoch, minibatch = divmod(position, steps)
        order = list(range(len(self.rows)))
        if epoch:
            shuffled = Stream(self.run.args.seed, Role.DATA, Purpose.INNER_EPOCH).at(start=self.start, epoch=epoch)
            order = shuffled.numpy_generator().permutation(len(order)).tolist()
        size = len(order) // steps
        return self._batches([self.rows[i] for i in order[minibatch * size : (minibatch + 1) * size]])

    @property
    def _world(self) -> int:
        return self.run.accelerator.num_processes

    @property
    def _batch_rows(self) -> int:
        return self.run.args.train_batch_size

    @property
    def _step_rows(self) -> int:
        """Rows of one optimiser step over all processes."""
        return self.run.args.gradient_accumulation_steps * self._batch_rows * self._world

    @property
    def _settings(self) -> dict[str, int]:
        """What says which rows an optimiser step takes; with another of them a run cannot go on."""
        return {
            "num_minibatches": self.minibatches,
            "num_inner_epochs": self.inner_epochs,
            ROWS_PER_STEP: self._step_rows,
        }

    def _gathered(self, batches: list[Batch], count: int) -> list[RolloutRow]:
        """The rows of all processes, in the order of the data: batches are dealt to the processes in turn."""
        rows = gather_object(rows_of(batches))
        size, rank_rows = self._batch_rows, count * self._batch_rows
        starts = (rank * rank_rows + batch * size for batch in range(count) for rank in range(self._world))
        return [row for start in starts for row in rows[start : start + size]]

    def _batches(self, rows: list[RolloutRow]) -> list[Batch]:
        """This process's batches of one optimiser step."""
        size, run = self._batch_rows, self.run
        starts = range(run.accelerator.process_index * size, len(rows), self._world * size)
        return [
            batch_of(
                rows[start : start + size], run.sampling.pad_token_id, run.args.pad_to_multiple_of, run.args.device
            )
            for start in starts
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return settings and running cycle: ids and log-probabilities of all rows in turn, and the lengths of parts.

        These are `[N, 2]`, or `[N, 3]` where the teacher has prompts of its own.
        """
        if not self.rows:
            return {"settings": self._settings}
        ids = [token for row in self.rows for part in row.parts for token in part]
        lengths = [[len(part) for part in row.parts] for row in self.rows]
        return {
            "settings": self._settings,
            "start": self.start,
            "ids": torch.tensor(ids, dtype=torch.int32),
            "lengths": torch.tensor(lengths, dtype=torch.int32),
            "logps": torch.cat([row.logps for row in self.rows]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up `state_dict` again; an empty one is that of a run without cycles.

        Raises:
            CheckpointError: it was written with other settings than the run's.
        """
        self._check(state.get("settings", WITHOUT_CYCLES))
        if "start" not in state:
            return
        self.start, lengths = state["start"], state["lengths"].tolist()
        parts = iter(state["ids"].split([length for of_row in lengths for length in of_row]))
        logps = state["logps"].split([of_row[-1] for of_row in lengths])
        self.rows = []
        for of_row, values in zip(lengths, logps, strict=True):
            prompt, *view, answer = (next(parts).tolist() for _ in of_row)
            self.rows.append(RolloutRow(prompt, answer, values.clone(), *view))

    def _check(self, written: Mapping[str, int]) -> None:
        settings = self._settings
        names = [name for name in written if written[name] != settings[name]]
        if names:
            got = ", ".join(f"{name}: {settings[name]}" for name in names)
            expected = ", ".join(f"{name}: {written[name]}" for name in names)
            raise CheckpointError(
                f"Got `{got}`; expected `{expected}`, with which the checkpoint was written: its place in the data and "
                f"in its rollouts is counted in them. Resume with those ({ROWS_PER_STEP}: per_device_train_batch_size "
                "× gradient_accumulation_steps × processes), or start a new run from its weights."
            )


def rows_of(batches: Sequence[Batch]) -> list[RolloutRow]:
    """Return the rows of batches whose completions were sampled and scored."""
    rows = sampled_rows(batches)
    logps = torch.cat([batch[LOGPS][batch["labels"] != IGNORE_INDEX].cpu() for batch in batches])
    parts = logps.split([len(row[-1]) for row in rows])
    return [
        RolloutRow(prompt, completion, part, *view)
        for (prompt, *view, completion), part in zip(rows, parts, strict=True)
    ]


def batch_of(rows: Sequence[RolloutRow], pad_token_id: int, multiple: int | None, device: torch.device) -> Batch:
    """Make one batch of sampled rows."""
    tokens = [with_teacher_prompt(row_of(row.prompt, row.completion), row.teacher_prompt) for row in rows]
    batch: Batch = DistillCollator(pad_token_id, multiple)(tokens)
    return with_logps({name: value.to(device) for name, value in batch.items()}, torch.cat([row.logps for row in rows]))


def with_logps(batch: Batch, logps: Tensor) -> Batch:
    """Add log-probabilities `[N, K]` of a batch's completion tokens, in row-major order."""
    labels, values = batch["labels"], logps.to(batch["labels"].device)
    entry = values.new_zeros((*labels.shape, values.shape[-1]))
    entry[labels != IGNORE_INDEX] = values
    return {**batch, LOGPS: entry}
