"""Text of the next optimiser step, sampled by a server while this one trains: one step old when it is trained on.

At its start a step has its own text, reads the batches of the next, sends the server its weights and asks for the next
step's text. Random numbers are those of the step that trains on them, as without. A checkpoint holds that text, since
the weights which wrote it are gone. The first step of an epoch, whose batches nobody knows before, waits for its text.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object

from ...exceptions import ServerError
from ...rollouts import Completions
from ..protocol import Batch

logger = logging.getLogger(__name__)


class SampleAhead:
    """The coming step's batches, and text by the step that trains on it; no more than two steps of it are kept.

    Args:
        run: a trainer whose engine has `start`.
        samples_at: tells whether a step samples, alike on all processes.
    """

    def __init__(self, run: Any, samples_at: Callable[[int], bool]):
        self.run, self.samples_at = run, samples_at
        self.texts: dict[int, Callable[[], Completions]] = {}
        self._iterator: Any = None
        self._coming: list[Batch] = []

    def next_batches(self, epoch_iterator: Iterator, num_batches: int) -> list[Batch]:
        """Return the batches of the coming step, whose text is there; that of the step behind it is asked for."""
        state, window = self.run.state, self.run.args.gradient_accumulation_steps
        if epoch_iterator is not self._iterator:
            self._iterator = epoch_iterator
            self._coming = list(itertools.islice(epoch_iterator, num_batches))
        batches, self._coming = self._coming, list(itertools.islice(epoch_iterator, window))
        step = state.global_step
        self.texts = {of: text for of, text in self.texts.items() if of == step}
        if batches and self.samples_at(step):
            if step not in self.texts:
                self.texts[step] = self._asked(batches, step)
            self.texts[step]()  # before the server gets other weights
        if self._coming and step + 1 < state.max_steps and self.samples_at(step + 1):
            self.texts[step + 1] = self._asked(self._coming, step + 1)
        return batches

    def generate(self, *given: Any) -> Completions:
        """Return the text of the coming step, in place of `RolloutEngine.generate`."""
        text = self.texts.get(self.run.state.global_step)
        return self.run.engine.generate(*given) if text is None else text()

    def _asked(self, batches: list[Batch], step: int) -> Callable[[], Completions]:
        prompts, streams = self.run.rollout_prompts(batches, step)
        return self.run.engine.start(self.run.model_wrapped, *prompts, self.run.sampling, streams)

    def state_dict(self) -> dict[str, Any]:
        """Return the coming step's text on all processes: ids and log-probabilities in turn, lengths, rows of each.

        Nothing where there is none, or a server stays away: it is then sampled anew.
        """
        step = self.run.state.global_step
        if step not in self.texts:
            return {}
        own: Any = None
        try:
            text = self.texts[step]()
            own = list(text), text.drawn_logps(self.run.sampling)
        except ServerError as error:
            logger.warning("The text of step %d was not had (%s): a resumed run samples it anew.", step + 1, error)
        parts = gather_object([own])
        if any(part is None or part[1] is None for part in parts):
            return {}
        rows = [row for ids, _ in parts for row in ids]
        return {
            "step": step,
            "rows": [len(ids) for ids, _ in parts],
            "ids": torch.tensor([token for row in rows for token in row], dtype=torch.int32),
            "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32),
            "logps": torch.tensor([logp for _, logps in parts for row in logps for logp in row], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up `state_dict` again; that of another number of processes is sampled anew."""
        if "step" not in state:
            return
        accelerator, lengths = self.run.accelerator, state["lengths"].tolist()
        if len(state["rows"]) != accelerator.num_processes:
            logger.warning("The checkpoint is of %d processes: its text is sampled anew.", len(state["rows"]))
            return
        end = sum(state["rows"][: accelerator.process_index + 1])
        own = slice(end - state["rows"][accelerator.process_index], end)
        ids, logps = ([part.tolist() for part in state[name].split(lengths)][own] for name in ("ids", "logps"))
        text = Completions(ids, logps)
        self.texts = {state["step"]: lambda: text}
