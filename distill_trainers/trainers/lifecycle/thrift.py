"""What a long run does for its memory: how its state is written, and what is given back."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json

from transformers import TrainerState


class RunState(TrainerState):
    """`TrainerState` that writes itself without a copy of all logs of the run.

    transformers copies them and joins their text in memory at each checkpoint, some ten times what they take, and the
    process keeps what that leaves in pieces.
    """

    @classmethod
    def of(cls, state: TrainerState) -> RunState:
        """Return the same state as one of this class."""
        return cls(**{field.name: getattr(state, field.name) for field in dataclasses.fields(state)})

    def save_to_json(self, json_path: str) -> None:
        """Write the text that transformers writes."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        with open(json_path, "w", encoding="utf-8") as file:
            file.writelines(json.JSONEncoder(indent=2, sort_keys=True).iterencode(fields))
            file.write("\n")


def give_back_free_memory() -> None:
    """Return memory that malloc holds free to the system: glibc keeps it, and each large task leaves other holes."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, which has no such call
        ctypes.CDLL(None).malloc_trim(0)
