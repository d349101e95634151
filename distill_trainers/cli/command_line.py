"""What all commands take: a recipe without `--config`, modules of the user's own, and libraries that are quiet."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from ..exceptions import ConfigurationError

# What libraries tell at each start or step, of themselves, and nobody can act upon: the logger, and words of it.
_NOISE = {
    "torch.utils._pytree": "register_constant() on Enum",  # torchao, as it is imported
    "torchao": "Failed to load",  # its kernels for GPUs, wherever there is none
    "DeepSpeed": "Setting accelerator to CPU",
}


class _Without(logging.Filter):
    """Drops the records that have these words. A level would be set anew as the library is imported."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in str(record.msg)


def quiet_libraries() -> None:
    """Leave out noise of libraries, and their bars where nobody watches them; to be called before they are imported."""
    for name, words in _NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(words))
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # TRL's and PEFT's
    if not sys.stderr.isatty():  # a bar in a file is a line for each of its states
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def with_config(argv: Sequence[str]) -> list[str]:
    """Write `--config` before a recipe that is named without it: `train recipe.yaml`."""
    for place, word in enumerate(argv):
        before = argv[place - 1] if place else ""
        is_file = word.endswith((".yaml", ".yml")) and not word.startswith("-")
        if is_file and (not before.startswith("-") or "=" in before or _is_switch(before)):
            return [*argv[:place], "--config", *argv[place:]]
    return list(argv)


def _is_switch(option: str) -> bool:
    """Whether an option stands without a value, too: such as `--quick` and `--no_doctor`."""
    name = option.lstrip("-").replace("-", "_")
    if name == "config":  # the usual case, in which nothing has to be imported
        return False
    from .completion import names_of_switches

    return name in {"h", "help", "traceback"} or name.removeprefix("no_") in names_of_switches()


def import_modules(argv: list[str]) -> list[str]:
    """Import what `--import MODULE` names, such as a method of one's own, and take these words out.

    A module may lie in the folder where the command is started. No recipe can ask for it: it runs code.

    Raises:
        ConfigurationError: a module that is not there, or fails.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--import=") else [word])]
    while "--import" in words:
        place = words.index("--import")
        if place + 1 == len(words):
            raise ConfigurationError("Got `--import` without a module; expected one that Python finds, by its name.")
        name = words[place + 1]
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a module of the user's may raise
            raise ConfigurationError(
                f"Got `--import {name}`, which cannot be imported ({type(error).__name__}: {error}); expected a module "
                "that Python finds, by its name. Start the command in its folder, or install it."
            ) from error
        del words[place : place + 2]
    return words
