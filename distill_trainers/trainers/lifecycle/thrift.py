"""What a long run does for its memory: how its state is written, what is given back, what is looked at for garbage."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
from collections.abc import Iterator

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


@contextlib.contextmanager
def collecting_what_is_new() -> Iterator[None]:
    """Let Python's collector look at nothing that was there before.

    It waits with a full look until a quarter of all objects are new. Half a million come with the imports, so what
    refers to itself would be kept for thousands of steps.
    """
    if gc.get_freeze_count():  # the user has done so, and says when it ends
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
