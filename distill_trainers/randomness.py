"""The random numbers of a run: each sequence has a name, and nothing else in the package seeds a generator.

A name says from which seed, whose (`Role`), what for (`Purpose`) and, within that, at which place: step, process, row,
prompt. Two names never share their numbers. So the student's text tells nothing about its teacher's, a resumed run
draws what the uninterrupted one drew, and a text depends neither on its batch nor on the number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch


class Role(StrEnum):
    """Whose random numbers they are."""

    RUN = "run"  # what all processes decide alike
    DATA = "data"
    STUDENT = "student"
    TEACHER = "teacher"
    SCORES = "scores"


class Purpose(StrEnum):
    """What random numbers are for; each is used at one place of the package."""

    ON_POLICY = "whether a step trains on text that the student samples"
    ROLLOUT = "text that is trained on in the step that samples it"
    MIXTURE = "which model draws a token of a mixture"
    REPLAY = "which of the kept rollouts are trained on again"
    TOKEN_BATCHES = "which rows of like length are one batch, and the order of batches"
    INNER_EPOCH = "the order of a cycle's rollouts"
    PLAIN_TEXT = "the order of plain text"
    COMPLETION = "text of the teacher where rows have none, or instead of theirs"
    REJECTED = "rejected responses to evaluation prompts"
    SCORED = "text that is scored"
    PASSED = "completions of held-out prompts that pass or do not"
    PAIR = "responses of a file of preference pairs"
    RATIONALE = "chains of thought"
    CACHE = "ids of a sampled cache"
    BOOTSTRAP = "resamples of prompts"


@dataclass(frozen=True)
class Stream:
    """The name of one sequence of random numbers, which always starts anew.

    Args:
        seed: of the run or the command.
        place: what else tells it from its neighbours, as in `stream.at(step=3, row=0)`.
    """

    seed: int
    role: Role
    purpose: Purpose
    place: Mapping[str, int | str] = field(default_factory=dict)

    def at(self, **place: int | str) -> Stream:
        """Return the stream of a place within this one."""
        return replace(self, place={**self.place, **place})

    def as_dict(self) -> dict[str, Any]:
        """Return the whole name."""
        return {"seed": self.seed, "role": self.role.value, "purpose": self.purpose.name.lower(), **self.place}

    @property
    def number(self) -> int:
        """The name as 128 bits."""
        name = json.dumps([self.seed, self.role, self.purpose.name, self.place], sort_keys=True)
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")

    def numpy_generator(self) -> np.random.Generator:
        """Make NumPy's generator, which takes all bits of the name."""
        return np.random.default_rng(self.number)

    def torch_generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Make torch's generator, for draws on a device. On a CPU it keeps 32 bits of its seed."""
        return torch.Generator(device=device).manual_seed(self.number % 2**63)

    @contextlib.contextmanager
    def ruling_torch(self, device: torch.device) -> Iterator[None]:
        """Seed torch's own state, for libraries that draw from it; afterwards the state is as it was."""
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.number % 2**63)
            yield
