"""`bf16: auto` of a recipe: what is faster on this machine, decided once and kept when the run goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from ..exceptions import ConfigurationError

logger = logging.getLogger(__name__)

_SOURCE, _KWARGS = "teacher_model_name_or_path", "teacher_model_init_kwargs"


def settle_precision(given: dict[str, Any], argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Put true or false for `auto`; where it is false, a teacher's weights are loaded in float32, too.

    On a CPU, products of the student's widths are timed in both dtypes (`models.precision`). On a GPU, bfloat16 is
    taken where it is in the hardware. A run that goes on takes what its checkpoint was written with, and one with a
    `teacher_cache` what that was begun with: answers in another precision would be refused.

    Args:
        given: what the file says.
        argv: options of the command line, which come first.

    Raises:
        ConfigurationError: several processes on CPUs, which might decide differently.
    """
    options = _options(argv)
    if str(options.get("bf16", given.get("bf16"))).lower() != "auto":
        return given, list(argv)
    argv = _without(argv, "bf16")
    told = {**given, **options}
    then = _then(told)
    narrow = then["bf16"] if "bf16" in then else _measured(told)
    given = {**given, "bf16": narrow}
    if narrow and "use_cpu" not in told and not _has_accelerator():
        given["use_cpu"] = True  # transformers refuses bf16 on a CPU that is not asked for
    if narrow or _KWARGS in options:
        return given, argv
    if "teachers" not in options:
        members = {name: _in_float32(entry, given.get(_KWARGS)) for name, entry in _members(given).items()}
        given |= {"teachers": members} if members else {}
    if _is_loaded(told.get(_SOURCE)) and _lacks_dtype(kwargs := given.get(_KWARGS) or {}):
        given[_KWARGS] = then.get(_KWARGS) or {**kwargs, "dtype": "float32"}
    return given, argv


def _members(told: dict[str, Any]) -> dict[str, Any]:
    """Return teachers by name; none where there is one, or what the recipe says of them is refused later."""
    members = told.get("teachers")
    return members if isinstance(members, dict) else {}


def _is_loaded(source: Any) -> bool:
    return source is not None and not str(source).startswith(("http://", "https://"))


def _lacks_dtype(kwargs: Any) -> bool:
    return isinstance(kwargs, dict) and not {"dtype", "torch_dtype"} & kwargs.keys()


def _in_float32(entry: Any, common: Any) -> Any:
    """Return one of several teachers, in float32 where it is loaded here and no dtype is said."""
    settings = dict(entry) if isinstance(entry, dict) else {_SOURCE: entry}
    kwargs = settings.get(_KWARGS, common) or {}
    loaded = _is_loaded(settings.get(_SOURCE, settings.get("teacher_model")))
    return {**settings, _KWARGS: {**kwargs, "dtype": "float32"}} if loaded and _lacks_dtype(kwargs) else entry


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _measured(told: dict[str, Any]) -> bool:
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    if str(told.get("use_cpu", False)).lower() != "true" and (torch.cuda.is_available() or _has_accelerator()):
        if torch.cuda.is_available():
            narrow = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # XPU, MPS and others, as transformers will ask of them
            narrow = is_torch_bf16_gpu_available()
        logger.info("`bf16: auto` is %s: of this GPU.", str(narrow).lower())
        return narrow
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError(
            "Got `bf16: auto` with several processes on CPUs, which might decide differently; expected true or false. "
            "`distill-trainers doctor` says which is faster."
        )
    from ..models.precision import products_of

    products = products_of(_config(told))
    logger.info("`bf16: auto` is %s: %s.", str(products.narrow).lower(), products)
    return products.narrow


def _config(told: dict[str, Any]) -> Any:
    """Return the config of the student, or of the teacher that it is made from; None where it cannot be read yet.

    Code of the model's own is not run for that, and nobody is asked whether it may.
    """
    from ..models import load_config

    name = told.get("model_name_or_path") or told.get("teacher_model_name_or_path")
    try:
        return load_config(str(name), "student") if name else None
    except ConfigurationError:  # a bad name is refused later, by its own words
        return None


def _then(told: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the checkpoint that the run goes on from, or of its cache; empty where both are new."""
    from ..manifest import sealed_settings
    from ..run_files import find_last_complete_checkpoint
    from ..teachers.cache.identity import read_identity

    asked = str(told.get("resume_from_checkpoint") or "false")
    output = told.get("output_dir")
    folder: str | None = None if asked.lower() in ("true", "false") else asked
    if asked.lower() == "true" and output:
        folder = find_last_complete_checkpoint(str(output))
    settings = sealed_settings(folder) if folder and os.path.isdir(folder) else {}
    members = [entry for entry in _members(told).values() if isinstance(entry, dict)]
    caches = [entry.get("teacher_cache") for entry in (told, *members)]
    for cache in filter(None, caches if "bf16" not in settings else ()):
        identity = read_identity(str(cache))
        if identity is not None:
            return {"bf16": identity.autocast == "bf16"}
    return settings


def _options(argv: Sequence[str]) -> dict[str, str]:
    """Return `--name value` and `--name=value` by name."""
    options: dict[str, str] = {}
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            following = argv[position + 1] if position + 1 < len(argv) else "true"
            options[name[2:].replace("-", "_")] = value if equals else "true" if following[:2] == "--" else following
    return options


def _without(argv: Sequence[str], name: str) -> list[str]:
    kept: list[str] = []
    skips = False
    for argument in argv:
        if skips:
            skips = False
        elif argument == f"--{name}":
            skips = True
        elif not argument.startswith(f"--{name}="):
            kept.append(argument)
    return kept
