"""What a run leaves in its `output_dir`: names of files, the record of a run, and which checkpoint is whole."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from . import models
from .exceptions import CheckpointError
from .manifest import damage_of
from .redaction import redacted, without_secrets

logger = logging.getLogger(__name__)

STUDENT_INIT_NAME = "student_init"
COMPLETIONS_NAME = "completions"
SAMPLES_NAME = "samples.jsonl"  # completions of held-out prompts, by evaluation


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """Return the newest checkpoint that was written to its end (the trainer state is written last).

    Raises:
        CheckpointError: there is none.
    """
    folder = find_last_complete_checkpoint(output_dir)
    if folder is None:
        raise CheckpointError(
            f"Asked to resume, but {str(output_dir)!r} holds no complete checkpoint. Start without "
            "`resume_from_checkpoint`, or name the checkpoint's folder."
        )
    return folder


def find_last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Do as `last_complete_checkpoint`, but return None where there is none.

    The newest is the one written last: one of a later step may be of a run that was given up, and gone back from.
    """
    complete = [f for f in Path(output_dir).glob("checkpoint-*") if is_complete(f)]
    steps = {f: int(f.name.rsplit("-", 1)[1]) for f in complete if f.name.rsplit("-", 1)[1].isdigit()}
    if not steps:
        return None
    newest = max(steps, key=lambda f: ((f / TRAINER_STATE_NAME).stat().st_mtime_ns, steps[f]))
    highest = max(steps, key=lambda f: steps[f])
    if steps[highest] > steps[newest]:
        logger.warning(
            "Taking %s, which was written after %s of a later step: that one is of a run that was gone back from, or "
            "of another. Name a checkpoint's folder to choose for yourself.",
            newest,
            highest.name,
        )
    return str(newest)


def is_complete(folder: str | Path) -> bool:
    """Tell whether a checkpoint was written to its end: the trainer state comes last and can be read."""
    try:
        json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def check_resumable(folder: str | Path) -> None:
    """Refuse a checkpoint that is damaged, or has not all that a run goes on from: parts would start anew, unnoticed.

    Raises:
        CheckpointError: there is no such folder, a file is not as it was written, or it was written with
            `save_only_model`.
    """
    if not str(folder) or not os.path.isdir(folder):
        raise CheckpointError(
            f"Got {str(folder)!r} to resume from; expected the folder of a checkpoint, such as "
            "`output_dir/checkpoint-500`, or `true` for the newest one of `output_dir`."
        )
    folder = Path(folder)
    damage = damage_of(folder) if folder.is_dir() else None
    if damage is not None:
        whole = [f for f in folder.parent.glob("checkpoint-*") if is_complete(f) and damage_of(f) is None]
        newest = max(whole, key=lambda f: (f / TRAINER_STATE_NAME).stat().st_mtime_ns, default=None)
        remedy = f"The newest whole one is {newest}: name that." if newest else "No other is whole: start a new run."
        raise CheckpointError(f"The checkpoint {str(folder)!r} is damaged: {damage}. {remedy}")
    patterns = ("optimizer*", "global_step*")  # the latter by DeepSpeed
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in patterns):
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} holds no optimizer state (`save_only_model: true`), so a run cannot go on "
            "from it: optimizer and learning rate would start anew. Start a new run with it as the student's `model`, "
            "or resume a checkpoint that was saved with `save_only_model: false`."
        )
    if is_complete(folder) and (folder / "optimizer.pt").is_file() and not (folder / "scheduler.pt").is_file():
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} has no scheduler.pt: optimizer and learning rate would start anew. Resume "
            "another one."
        )


RECORD_NAME = "run.json"


FORMAT = "distill_trainers.run"


VERSION = 1


# Keys that tell about machines.
_PLACE = re.compile(r"(_dir|_file|(?<!or)_path|_host|_addr(ess)?|_space_id|_bucket_id)$|(^|_)(host|endpoint|base_url)$")
_MEMORY = re.compile(r" at 0x[0-9a-fA-F]+")  # another one in each process
SERVER = "(a server)"
_ADDRESS = re.compile(r"(?i)[a-z][a-z0-9+.-]*://\S+(,\s*[a-z][a-z0-9+.-]*://\S+)*")
_PUBLIC = re.compile(r"(?i)hf://|https?://(huggingface\.co|hf\.co|arxiv\.org|github\.com|pypi\.org)(/|$)")
_HOME = re.compile(r"(?:/home/|/Users/|\b[A-Za-z]:\\Users\\)[^\s/\\:'\"]+")


def shown(name: str) -> str:
    """Return a Hub id, the last part of a path, or that it is a server: where it lies is nobody's business.

    Text comes as it is, but for secrets and for the home of a user in it.
    """
    name = redacted(name)
    if _ADDRESS.fullmatch(name):
        return name if _PUBLIC.match(name) else SERVER
    if len(name) < 4096 and "\n" not in name and (_is_there(name) if " " in name else models.looks_like_path(name)):
        return "~" if _HOME.fullmatch(name.rstrip("/")) else Path(name).name
    return _HOME.sub("~", name)


def _is_there(name: str) -> bool:
    """Tell whether text with spaces is a path: a prompt may begin with a slash too."""
    return bool(_HOME.match(name)) or os.path.exists(name)  # a pathlib.Path raises at long text


def plain(value: Any) -> Any:
    """Return settings as JSON, the same in every process: folders by name, no address and no possible secret."""
    return _as_json(without_secrets(value))


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        told = {str(key): _as_json(item) for key, item in value.items() if not _PLACE.search(str(key))}
        return {key: "a served teacher" if item == SERVER and "teacher" in key else item for key, item in told.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, map(_as_json, value)))
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    value = getattr(value, "value", value)
    if isinstance(value, str):
        return shown(value)
    return value if value is None or isinstance(value, bool | int | float) else _MEMORY.sub("", str(value))


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read `run.json` of a run; empty where there is none that can be read."""
    try:
        read = json.loads((Path(folder) / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) and read.get("format") == FORMAT and read.get("version") == VERSION else {}
