"""Completions generated once and kept on disk, found again by the content of their prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


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
        self.folder.mkdir(parents=True, exist_ok=True)
        self._own = self.folder / f"part-{rank:05d}.jsonl"
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
        """Add (prompt key, completion) pairs and flush them to disk."""
        torn = self._own.exists() and self._own.stat().st_size and not self._own.read_bytes().endswith(b"\n")
        with self._own.open("a") as out:
            if torn:
                out.write("\n")
            for key, completion in completions:
                out.write(json.dumps({"prompt": key, "completion": completion}) + "\n")
