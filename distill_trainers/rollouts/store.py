"""Completions generated once and kept on disk, found again by the content of their prompt."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..storage import writing

_REMEDY = "Completions written earlier are kept: free some space, or set `completions_dir`, and start again."


def prompt_key(prompt_ids: Sequence[int]) -> str:
    """Identifies a prompt by its tokens, whatever its place in the dataset."""
    return hashlib.sha256(",".join(map(str, prompt_ids)).encode()).hexdigest()[:24]


class CompletionStore:
    """One folder of JSON lines per (teacher, sampling) pair; each process appends to a file of its own.

    Killed at any moment, it keeps every line that was complete; the next run generates only what is missing.

    Args:
        root: folder for all stores.
        identity: whatever the completions depend on beside the prompt: teacher fingerprint, sampling settings.
        rank: this process.
    """

    def __init__(self, root: str | Path, identity: Mapping[str, Any], rank: int = 0):
        described = json.dumps(identity, sort_keys=True, default=str)
        self.folder = Path(root) / hashlib.sha256(described.encode()).hexdigest()[:16]
        self._own = self.folder / f"part-{rank:05d}.jsonl"
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                (self.folder / "identity.json").write_text(json.dumps(identity, indent=2, sort_keys=True, default=str))

    def load(self) -> dict[str, list[int]]:
        """All completions of all processes, by prompt key."""
        found: dict[str, list[int]] = {}
        for part in sorted(self.folder.glob("part-*.jsonl")):
            for line in part.read_text().splitlines():
                try:
                    record = json.loads(line)
                    found[record["prompt"]] = record["completion"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # the line a killed writer left half-written
        return found

    def append(self, completions: Iterable[tuple[str, list[int]]]) -> None:
        """Add (prompt key, completion) pairs and flush them to disk.

        Raises:
            CheckpointError: there is no room for them.
        """
        with self._writing():
            self._append(completions)

    def _writing(self) -> AbstractContextManager[None]:
        return writing("the teacher's completions", self.folder, _REMEDY, keep_begun=True)

    def _append(self, completions: Iterable[tuple[str, list[int]]]) -> None:
        with self._own.open("a+b") as out:
            if out.tell():
                out.seek(-1, os.SEEK_END)
                if out.read(1) != b"\n":  # the line that a killed writer left half-written
                    out.write(b"\n")
            for key, completion in completions:
                out.write((json.dumps({"prompt": key, "completion": completion}) + "\n").encode())
