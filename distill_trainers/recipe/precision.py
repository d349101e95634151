"""`bf16: auto` of a recipe: what is faster on this machine, decided once and kept when the run goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from ..exceptions import ConfigurationError

logger = logging.getLogger(__name__)


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
    name, teacher = "teacher_model_init_kwargs", told.get("teacher_model_name_or_path")
    if narrow or teacher is None or str(teacher).startswith(("http://", "https://")) or name in options:
        return given, argv
    kwargs = given.get(name) or {}
    if isinstance(kwargs, dict) and not {"dtype", "torch_dtype"} & kwargs.keys():
        given[name] = then.get(name) or {**kwargs, "dtype": "float32"}
    return given, argv


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _measured(told: dict[str, Any]) -> bool:
    import torch

    on_cpu = str(told.get("use_cpu", False)).lower() == "true" or not torch.cuda.is_available()
    if not on_cpu:
        narrow = torch.cuda.is_bf16_supported(including_emulation=False)
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
    cache = told.get("teacher_cache")
    identity = read_identity(str(cache)) if cache and "bf16" not in settings else None
    return settings if identity is None else {"bf16": identity.autocast == "bf16"}


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
