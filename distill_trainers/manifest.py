"""What a whole checkpoint, or other folder, holds: its files with sizes and checksums, and settings that must agree."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from .storage import write_file

MANIFEST_NAME = "manifest.json"
_UNREAD = {MANIFEST_NAME, "training_args.bin"}  # no run goes on from the latter, and it is not uploaded
_PIECE = 2**24
_DAMAGED: dict[str, Any] = {"files": {MANIFEST_NAME: {"bytes": -1, "xxh3": ""}}}  # the manifest itself

# Settings that change neither what is drawn nor what is computed, or that say themselves how to resume.
_HARMLESS = re.compile(
    r"output_dir|run_name|report_to|project|trackio.*|log(ging)?_.*|save_.*|(per_device_)?eval_.*|hub_.*|push_to_hub"
    r"|do_.*|load_best_model_at_end|metric_for_best_model|greater_is_better|disable_tqdm|resume_.*|restore_.*"
    r"|ignore_data_skip|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)|ddp_.*|fsdp.*"
    r"|deepspeed|accelerator_config|parallelism_config|skip_memory_metrics|include_.*|.*_num_proc|use_cpu"
    r"|torch_empty_cache_steps|teacher_(server|placement|cache).*|reference_logps_dir|completions_dir|rollout_batch_size"
    r"|loss_chunk_mib|card_license|merge_adapter|verify_.*|max_steps|num_train_epochs|overwrite_.*"
    r"|(gradient|activation)_checkpointing.*|per_device_train_batch_size|gradient_accumulation_steps|local_rank|debug|prediction_loss_only"
)


def matters(name: str) -> bool:
    """Tell whether a run cannot go on exactly once this setting has changed."""
    return _HARMLESS.fullmatch(name) is None


def write_manifest(folder: Path, settings: Mapping[str, Any]) -> None:
    """Seal a checkpoint whose files are all written.

    Args:
        settings: JSON values by name, to be compared when a run goes on from it.

    Raises:
        CheckpointError: there is no room.
    """
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    names = [name for name in names if name not in _UNREAD]
    with ThreadPoolExecutor(4) as threads:  # the checksum runs outside of Python's lock
        sums = list(threads.map(lambda name: _checksum(folder / name), names))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "xxh3": crc} for name, crc in zip(names, sums, strict=True)
    }
    told = json.loads(json.dumps(dict(settings), default=str))
    text = json.dumps({"files": files, "settings": told, "settings_xxh3": _settings_checksum(told)}, indent=1)
    write_file(folder / MANIFEST_NAME, text, "the list of a checkpoint's files", "Free some space.")


def damage_of(folder: str | Path) -> str | None:
    """Say which file of a checkpoint is not as it was written; None where all are, or where no manifest tells."""
    folder = Path(folder)
    files = _read(folder).get("files", {})
    for name, told in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if told["bytes"] < 0:
            return f"{name} cannot be read"
        if file.stat().st_size != told["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes and had {told['bytes']:,}"
    with ThreadPoolExecutor(4) as threads:
        sums = dict(zip(files, threads.map(lambda name: _checksum_now(folder / name), files), strict=True))
    changed = [name for name, now in sums.items() if now != files[name]["xxh3"]]
    if not changed:
        return None
    return f"{changed[0]} {'has changed' if sums[changed[0]] else 'cannot be read'}"


def is_whole(folder: str | Path, settings: Mapping[str, Any]) -> bool:
    """Tell whether a folder was sealed with these settings, and each of its files is as it was written."""
    told = _read(Path(folder))
    return told.get("settings") == json.loads(json.dumps(dict(settings), default=str)) and damage_of(folder) is None


def sealed_settings(folder: str | Path) -> dict[str, Any]:
    """Return the settings that a folder was sealed with; empty where it was not."""
    return dict(_read(Path(folder)).get("settings", {}))


def differences(folder: str | Path, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """List settings that differ from those of a checkpoint: what they were, and what they are."""
    then = sealed_settings(folder)
    now = json.loads(json.dumps(dict(settings), default=str))
    return {name: (then[name], now[name]) for name in then if name in now and then[name] != now[name]}


def _read(folder: Path) -> dict[str, Any]:
    try:
        read = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return _DAMAGED
    # Another tool's file of this name says nothing of sizes and checksums: then none was written by `write_manifest`.
    files = read.get("files") if isinstance(read, dict) else None
    told = [_is_told(part) for part in files.values()] if isinstance(files, dict) else []
    if not any(told):
        return {}
    settings = read.get("settings")
    if not all(told) or not isinstance(settings, dict):
        return _DAMAGED
    # Those of earlier versions have no such checksum.
    return read if read.get("settings_xxh3", _settings_checksum(settings)) == _settings_checksum(settings) else _DAMAGED


def _settings_checksum(settings: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _is_told(file: Any) -> bool:
    return isinstance(file, dict) and file.keys() == {"bytes", "xxh3"}


def _checksum_now(file: Path) -> str | None:
    try:
        return _checksum(file)
    except OSError:  # closed to this process, or the disk has failed
        return None


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_64()  # as fast as memory: optimisers have tens of gigabytes
    with file.open("rb") as data:
        while piece := data.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
