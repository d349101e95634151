"""Student completions kept to be trained on again, and how often a run trains on its own text.

DistiLLM (Ko et al., arXiv 2402.03898): with probability φ(1−t/T) a step samples and keeps what it sampled, with
probability φ it trains on kept text, else on the dataset; φ rises whenever the validation loss did not fall.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..data import replace_completions
from ..data.views import BATCH_ENTRIES, has_view, teacher_prompts
from ..randomness import Purpose, Role, Stream
from .sampler_logps import sampler_logps_of, with_sampler_logps
from .sampling import pad_left

ReplayRow = tuple[list[Any], ...]
Batch = dict[str, Any]


class ReplayBuffer:
    """The newest `capacity` (prompt, completion) rows, first in, first out.

    Every process holds the same rows, so that one checkpoint serves any number of processes.

    Args:
        parts: token lists per row; 3 for (prompt, chosen, rejected). A row may have one part more: what its sampler
            thought of each token of the last list (`scored_rows`). A prompt of the teacher's own comes behind the
            prompt, and is one list more.
    """

    def __init__(self, capacity: int, parts: int = 2):
        self.parts = parts
        self.rows: deque[ReplayRow] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.rows)

    def push(self, rows: Iterable[ReplayRow], parts: int | None = None) -> None:
        """Add rows; the oldest make room.

        Args:
            parts: their token lists, if not as many as the buffer was made for.
        """
        self.parts = parts or self.parts
        self.rows.extend(rows)

    def sample(self, count: int, *, seed: int, step: int, rank: int) -> list[ReplayRow]:
        """Draw `count` rows from (seed, step, rank); different ones, unless fewer are there."""
        drawn = Stream(seed, Role.DATA, Purpose.REPLAY).at(step=step, rank=rank).numpy_generator()
        places = drawn.choice(len(self.rows), count, replace=count > len(self.rows))
        return [self.rows[place] for place in places.tolist()]

    def state_dict(self) -> dict[str, Tensor]:
        """Return all rows as tensors: ids one after the other, `[N, parts]` lengths, and what goes with them."""
        ids = [token for row in self.rows for token in chain(*row[: self.parts])]
        lengths = [[len(part) for part in row[: self.parts]] for row in self.rows]
        state = {
            "ids": torch.tensor(ids, dtype=torch.int32),
            "lengths": torch.tensor(lengths, dtype=torch.int32).reshape(-1, self.parts),
        }
        scored = [len(row) > self.parts for row in self.rows]
        if not any(scored):
            return state
        logps = [value for row in self.rows for value in chain(*row[self.parts :])]
        return {**state, "scored": torch.tensor(scored), "logps": torch.tensor(logps, dtype=torch.float32)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up `state_dict` again; a smaller capacity keeps the newest rows."""
        self.rows.clear()
        self.parts = state["lengths"].shape[1]
        lists = iter([part.tolist() for part in state["ids"].split(state["lengths"].flatten().tolist())])
        rows: list[ReplayRow] = list(zip(*[lists] * self.parts, strict=True))
        if "scored" in state:
            scored = state["scored"].tolist()
            lengths = [len(row[-1]) if told else 0 for row, told in zip(rows, scored, strict=True)]
            logps = state["logps"].split(lengths)
            told_of = zip(rows, scored, logps, strict=True)
            rows = [(*row, values.tolist()) if told else row for row, told, values in told_of]
        self.push(rows)


class AdaptiveProbability:
    """φ of DistiLLM: rises by 0.1, at most to 1, whenever an evaluation's loss is not below the one before."""

    def __init__(self, start: float):
        self.value = start
        self.last_loss: float | None = None

    def evaluated(self, loss: float) -> None:
        """Take in the loss of one evaluation; the first is only remembered."""
        if self.last_loss is not None and not loss < self.last_loss:
            self.value = min(1.0, self.value + 0.1)
        self.last_loss = loss

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "last_loss": self.last_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.last_loss = state["value"], state["last_loss"]


def sampled_rows(batches: Sequence[Batch]) -> list[ReplayRow]:
    """Return the (prompt, completion) rows of batches whose completions were sampled.

    Where the teacher has a prompt of its own, it stands between the two.
    """
    rows: list[ReplayRow] = []
    for batch in batches:
        prompts, answers = batch["prompt_mask"].sum(dim=1).tolist(), batch["attention_mask"].sum(dim=1).tolist()
        texts = list(zip(batch["input_ids"].tolist(), prompts, answers, strict=True))
        views = teacher_prompts(batch, [ids[:prompt] for ids, prompt, _ in texts])
        for number, (ids, prompt, answer) in enumerate(texts):
            rows.append((ids[:prompt], *(() if views is None else (views[number],)), ids[prompt:answer]))
    return rows


def parts_of(batches: Sequence[Batch]) -> int:
    """Count the token lists of `sampled_rows`."""
    return 2 + has_view(batches[0])


def scored_rows(batches: Sequence[Batch]) -> list[ReplayRow]:
    """Return `sampled_rows`, each with what its sampler thought of the completion where that is known."""
    told = [logps for batch in batches for logps in sampler_logps_of(batch)]
    rows = zip(sampled_rows(batches), told, strict=True)
    return [row if logps is None else (*row, logps) for row, logps in rows]


def with_rows(
    batches: Sequence[Batch], rows: Sequence[ReplayRow], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> list[Batch]:
    """Put other prompts and completions in place of the batches' own, in order, and what samplers thought of them."""
    replaced, start = [], 0
    for batch in batches:
        chosen = rows[start : start + len(batch["prompt_ids"])]
        parts = parts_of([batch])
        prompts, *views, completions = zip(*(row[:parts] for row in chosen), strict=True)
        start += len(prompts)
        ids, mask = pad_left(prompts, pad_token_id, batch["prompt_ids"].device)
        new = {"prompt_ids": ids, "prompt_mask": mask}
        if views:
            ids, mask = pad_left(views[0], pad_token_id, batch["prompt_ids"].device)
            starts = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
            new |= dict(zip(BATCH_ENTRIES, (ids, mask, starts), strict=True))
        rest = {name: entry for name, entry in batch.items() if name not in BATCH_ENTRIES}  # of other prompts
        filled = replace_completions({**rest, **new}, completions, pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
        told = [row[parts] if len(row) > parts else None for row in chosen]
        replaced.append(filled if told == [None] * len(told) else with_sampler_logps(filled, told))
    return replaced
