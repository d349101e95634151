"""Completions generated once and kept on disk, found again by the content of their prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..redaction import hidden
from ..storage import RecordStore, write_file

_WHAT = "the teacher's completions"
_REMEDY = "Completions written earlier are kept: free some space, or set `completions_dir`, and start again."


def prompt_key(prompt_ids: Sequence[int]) -> str:
    """Identify a prompt by its tokens, whatever its place in the dataset."""
    return hashlib.sha256(",".join(map(str, prompt_ids)).encode()).hexdigest()[:24]


class CompletionStore:
    """One folder of JSON lines per (teacher, sampling) pair; each process appends to a file of its own.

    Killed at any moment, it keeps every line that was complete; the next run generates only what is missing.

    Args:
        identity: whatever the completions depend on beside the prompt: teacher fingerprint, sampling settings.
        rank: this process.
    """

    def __init__(self, root: str | Path, identity: Mapping[str, Any], rank: int = 0):
        described = json.dumps(identity, sort_keys=True, default=str)
        self.folder = Path(root) / hashlib.sha256(described.encode()).hexdigest()[:16]
        self._records = RecordStore(self.folder, rank, what=_WHAT, remedy=_REMEDY, key="prompt")
        if rank == 0:
            text = json.dumps(hidden(identity), indent=2, sort_keys=True, default=str)
            write_file(self.folder / "identity.json", text, _WHAT, _REMEDY)

    def load(self) -> dict[str, list[int]]:
        """Read all completions of all processes, by prompt key."""
        return {key: row["completion"] for key, row in self._records.load().items() if "completion" in row}

    def append(self, completions: Iterable[tuple[str, list[int]]]) -> None:
        """Add (prompt key, completion) pairs and flush them to disk.

        Raises:
            CheckpointError: there is no room for them.
        """
        self._records.append({"prompt": key, "completion": completion} for key, completion in completions)
