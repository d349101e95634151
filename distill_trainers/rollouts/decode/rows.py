"""The rows that the decode loop is writing, and what becomes of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sampling import PADDING, Stops

# Prompts are read together down to this share of the longest one's length.
_ALIKE = 3 / 4
# A beginning of fewer tokens is not worth a forward of its own.
_WORTH_SHARING = 8


@dataclass(frozen=True)
class Scored:
    """A completion of L tokens and log-probabilities of them, in nats.

    Args:
        logps: `[L, K]`: under the student at temperature 1, without filters; as drawn, so with temperature, filters and
            mixture; and, of a mixture, under its other model at temperature 1. Of plain completions as drawn alone.
        hidden: `[L, D]`, the states from which the mixture's other model predicted them, if it keeps them.
    """

    ids: list[int]
    logps: Tensor | None = None
    hidden: Tensor | None = None


class Rows:
    """The rows still being written, and all that belongs to them. n rows, P prompt positions, T positions so far.

    Args:
        ids, mask: `[n, P]`, padded on the left, the longest first.
        uniforms: `[n, max_new_tokens]`, or None to take the most likely tokens.
    """

    def __init__(self, ids: Tensor, mask: Tensor, uniforms: Tensor | None):
        self.prompt_width = ids.shape[1]
        self.places = list(range(len(ids)))
        self.ids = ids.masked_fill(~mask.bool(), PADDING)  # [n, T]; padding must not count as a token that was said
        self.inputs = ids
        self.mask: Tensor | None = mask
        self.positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        self.uniforms = uniforms
        self.ends = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)  # 0: not yet
        self.logps: Tensor | None = None  # [n, T − P, K]
        self.lengths: list[int] = mask.sum(dim=1).tolist()  # of the prompts
        self._forget_full_mask()

    @property
    def common(self) -> int:
        """How many tokens all prompts begin with, at least one less than the shortest has; 0 where few are saved."""
        prompts = [
            row[self.prompt_width - length :] for row, length in zip(self.ids.tolist(), self.lengths, strict=True)
        ]
        least, most = min(prompts), max(prompts)  # in the order of lists, all others lie between them
        shared = next((at for at, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
        shared = min(shared, min(self.lengths) - 1)
        return shared if shared >= _WORTH_SHARING and least != most else 0

    def alike(self) -> list[tuple[slice, int]]:
        """Return rows of prompts that are of similar length, and the longest one's."""
        lengths, starts = self.lengths, [0]
        for row, length in enumerate(lengths):
            if length < _ALIKE * lengths[starts[-1]]:
                starts.append(row)
        ends = [*starts[1:], len(lengths)]
        return [(slice(start, end), lengths[start]) for start, end in zip(starts, ends, strict=True)]

    @property
    def new_ids(self) -> Tensor:
        """`[n, T − P]`"""
        return self.ids[:, self.prompt_width :]

    def append(self, tokens: Tensor, eos: Tensor, stops: Stops | None) -> None:
        """Write one token `[n]` to each row, and note the rows that it ends."""
        self.ids = torch.cat([self.ids, tokens.unsqueeze(1)], dim=1)
        self.inputs = tokens.unsqueeze(1)
        self.positions = self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        ended = torch.isin(tokens, eos)
        if stops is not None:
            ended = ended | stops(self.new_ids)
        self.ends = torch.where((self.ends == 0) & ended, self.new_ids.shape[1], self.ends)

    def score(self, logps: Tensor) -> None:
        """Keep log-probabilities `[n, K]` of the tokens that are appended next."""
        logps = logps.unsqueeze(1)
        self.logps = logps if self.logps is None else torch.cat([self.logps, logps], dim=1)

    def completions(self, logps: Tensor | None = None, hidden: Tensor | None = None) -> dict[int, Scored]:
        """Return what was written so far, by the rows' places in the batch, with what goes with it, `[n, T − P, …]`."""
        written, ends, completions = self.new_ids.tolist(), self.ends.tolist(), {}
        for row, place in enumerate(self.places):
            span = slice(ends[row] or len(written[row]))
            parts = (None if values is None else values[row, span] for values in (logps, hidden))
            completions[place] = Scored(written[row][span], *parts)
        return completions

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.places = [self.places[row] for row in rows]
        index = torch.tensor(rows, device=self.ids.device)
        for name in ("ids", "inputs", "mask", "positions", "uniforms", "ends", "logps"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[index])
        self._forget_full_mask()

    def _forget_full_mask(self) -> None:
        if self.mask is not None and bool(self.mask.all()):
            self.mask = None  # without one, attention takes its faster kernels
