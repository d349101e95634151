"""Which checkpoints can be resumed from, and the method's own state in them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from ..exceptions import CheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

METHOD_STATE_NAME = "distill_state.json"
METHOD_TENSORS_NAME = "distill_state.safetensors"
STUDENT_INIT_NAME = "student_init"
COMPLETIONS_NAME = "completions"
SAMPLES_NAME = "samples.jsonl"  # completions of held-out prompts, by evaluation


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
    """As `last_complete_checkpoint`, but None where there is none.

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
    """Whether a checkpoint was written to its end: the trainer state comes last and can be read."""
    try:
        json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def remove_torn(output_dir: str | Path) -> None:
    """Remove what killed writers left half written: rotation would count it, and might keep it for a good one."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if folder.name.rsplit("-", 1)[1].isdigit() and not is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)


def check_resumable(folder: str | Path) -> None:
    """Refuse a checkpoint without the optimiser's state: its schedule would start anew, unnoticed.

    Raises:
        CheckpointError: it was written with `save_only_model`.
    """
    folder = Path(folder)
    kept = ("optimizer*", "global_step*")  # the latter by DeepSpeed
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in kept):
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} holds no optimizer state (`save_only_model: true`), so a run cannot go on "
            "from it: optimizer and learning rate would start anew. Start a new run with it as the student's `model`, "
            "or resume a checkpoint that was saved with `save_only_model: false`."
        )


def stream_position(folder: str | Path) -> tuple[int, int]:
    """Where in its stream a run was: whole passes before, and optimiser steps of the pass it was in."""
    state = json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    # Without a length, transformers takes max_steps for the length of a pass.
    passes = max(0, math.ceil(state["epoch"]) - 1)
    return passes, round((state["epoch"] - passes) * state["max_steps"])


@contextlib.contextmanager
def written_whole(folder: Path, accelerator: Accelerator, should_save: bool) -> Iterator[None]:
    """Within it, the checkpoint `folder` is written anew: wholly, or not at all.

    One that an earlier run left under that name comes back if this one fails. What fails once the checkpoint is
    complete (an upload, say) comes through as itself and costs no checkpoint.

    Raises:
        CheckpointError: it could not be written.
    """
    earlier = folder.with_name(f"earlier-{folder.name}")
    if should_save and folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        folder.rename(earlier)
    accelerator.wait_for_everyone()  # nobody writes into the one that is put away
    try:
        yield
    except Exception as error:
        if not should_save:
            raise
        if is_complete(folder):
            shutil.rmtree(earlier, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        if earlier.exists():
            earlier.rename(folder)
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise CheckpointError(
            f"Could not write the checkpoint {folder}: {error}. {free:.0f} MiB were free there. Checkpoints "
            "written earlier are intact; free some space and go on with `--resume_from_checkpoint true`."
        ) from error
    if should_save:
        shutil.rmtree(earlier, ignore_errors=True)


def write_method_state(folder: Path, state: dict[str, Any]) -> None:
    """Keep what the method must remember beside the checkpoint's weights: nested dicts of JSON values and tensors."""
    plain, tensors = _split(state)
    if tensors:
        save_file(tensors, folder / METHOD_TENSORS_NAME)
    (folder / METHOD_STATE_NAME).write_text(json.dumps(plain))


def read_method_state(folder: str | Path) -> dict[str, Any]:
    """What `write_method_state` wrote; empty where the method had nothing to remember."""
    file, tensor_file = Path(folder) / METHOD_STATE_NAME, Path(folder) / METHOD_TENSORS_NAME
    state: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for path, tensor in (load_file(tensor_file) if tensor_file.is_file() else {}).items():
        *names, last = path.split("/")
        part = state
        for name in names:
            part = part[name]
        part[last] = tensor
    return state


def _split(state: dict[str, Any], path: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values that JSON can hold, and tensors by their path."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[path + name] = value
        elif isinstance(value, dict):
            plain[name], inner = _split(value, f"{path}{name}/")
            tensors |= inner
        else:
            plain[name] = value
    return plain, tensors
