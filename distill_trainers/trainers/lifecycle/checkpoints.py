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

from ...exceptions import CheckpointError
from ...run_files import is_complete

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

METHOD_STATE_NAME = "distill_state.json"
METHOD_TENSORS_NAME = "distill_state.safetensors"


def remove_torn(output_dir: str | Path) -> None:
    """Remove what killed writers left half written: rotation would count it, and might keep it for a good one."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if folder.name.rsplit("-", 1)[1].isdigit() and not is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)


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
