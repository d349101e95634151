"""Which checkpoints can be resumed from, and the method's own state in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..exceptions import CheckpointError

METHOD_STATE_NAME = "distill_state.json"


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """The newest checkpoint that was written to its end (the trainer state is written last).

    Raises:
        CheckpointError: there is none.
    """
    found = find_last_complete_checkpoint(output_dir)
    if found is None:
        raise CheckpointError(
            f"Asked to resume, but {str(output_dir)!r} holds no complete checkpoint. Start without "
            "`resume_from_checkpoint`, or name the checkpoint's folder."
        )
    return found


def find_last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """As `last_complete_checkpoint`, but None where there is none."""
    complete = [f for f in Path(output_dir).glob("checkpoint-*") if (f / TRAINER_STATE_NAME).is_file()]
    numbered = [(int(f.name.rsplit("-", 1)[1]), str(f)) for f in complete if f.name.rsplit("-", 1)[1].isdigit()]
    return max(numbered)[1] if numbered else None


def write_method_state(folder: Path, state: dict[str, Any]) -> None:
    """Keep what the method must remember beside the checkpoint's weights."""
    (folder / METHOD_STATE_NAME).write_text(json.dumps(state))


def read_method_state(folder: str | Path) -> dict[str, Any]:
    """What `write_method_state` wrote; empty where the method had nothing to remember."""
    file = Path(folder) / METHOD_STATE_NAME
    return json.loads(file.read_text()) if file.is_file() else {}
