"""Print a script with which a shell completes commands, options and names of files."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..exceptions import ConfigurationError
from ..installing import pip_install
from . import COMMANDS, report_errors

SHELLS = ("bash", "zsh", "tcsh")
_SWITCHES = (bool, bool | None, "bool", "bool | None", "Optional[bool]")  # types, some of them as they are written


def make_parser() -> argparse.ArgumentParser:
    """Define the options."""
    parser = argparse.ArgumentParser(prog="distill-trainers completion", description=__doc__)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the script. It names all options itself: nothing of the package runs while somebody types."""
    options = make_parser().parse_args(list(argv))
    if importlib.util.find_spec("shtab") is None:
        raise ConfigurationError(
            f"Completion scripts are made by shtab, which is not installed: {pip_install('completion')}."
        )
    import shtab

    print(shtab.complete(make_parser_of_all(shtab.FILE), shell=options.shell))
    return 0


def make_parser_of_all(files: Any) -> argparse.ArgumentParser:
    """Define all commands with all their options, for completion alone.

    Args:
        files: what marks an argument that takes any text: names of files are proposed for it.
    """
    parser = argparse.ArgumentParser(prog="distill-trainers", description="Distil large language models.")
    commands = parser.add_subparsers(dest="command")
    for name, (module, text) in COMMANDS.items():
        module_of = importlib.import_module(f".{module}", __package__)
        if hasattr(module_of, "make_parser"):
            known = commands.add_parser(name, help=text, parents=[module_of.make_parser()], add_help=False)
        else:
            known = commands.add_parser(name, help=text)
            _add_settings(known, name)
        for action in known._actions:
            if action.nargs != 0 and action.choices is None:
                action.complete = files  # type: ignore[attr-defined]
    return parser


def _add_settings(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the keys of the files that a command reads, each once."""
    from .rationales import STAGES

    if command == "rationales":
        parser.add_argument("stage", choices=STAGES)
    if command == "cache-teacher":
        parser.add_argument("--inspect")
    parser.add_argument("--config")
    settings = {field.name: field for cls in _classes(command) for field in fields(cls) if field.init}
    for name, field in settings.items():
        choices = ["true", "false"] if isinstance(field.default, bool) else None
        parser.add_argument(f"--{name}", choices=choices)


def names_of_switches() -> set[str]:
    """Names of all settings that are true or false, of whatever command."""
    settings = [
        field
        for name in ("evaluate", "rationales", "doctor", "pairs", "prune")
        for cls in _classes(name)
        for field in fields(cls)
    ]
    return {field.name for field in settings if field.type in _SWITCHES}


def _classes(command: str) -> list[type]:
    from trl import ModelConfig

    from ..evaluation.settings import EvaluationSettings
    from ..recipe.parse import RecipeArguments
    from ..trainers import METHODS
    from .doctor import DoctorArguments
    from .evaluate import EvaluateArguments
    from .pairs import PairArguments
    from .prune import PruneArguments
    from .rationale_settings import PipelineArguments

    if command == "rationales":
        return [PipelineArguments]
    if command == "evaluate":
        return [EvaluateArguments, EvaluationSettings]
    own: dict[str, list[type]] = {"doctor": [DoctorArguments], "pairs": [PairArguments], "prune": [PruneArguments]}
    return [*own.get(command, []), RecipeArguments, *(config for config, _ in METHODS.values()), ModelConfig]


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
