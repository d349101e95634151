"""`--help` of commands that read a recipe: settings in groups, the method's own first, one name of each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

_TITLES = {
    "RecipeArguments": "the recipe",
    "DistillConfig": "all methods",
    "TeacherOptions": "the teacher",
    "RewardSettings": "rewards",
    "ModelConfig": "the student, by TRL's ModelConfig",
    "TrainingArguments": "training, by transformers' TrainingArguments",
}
_LAST = tuple(_TITLES)


class _OneName(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.option_strings[0] if action.option_strings else super()._format_action_invocation(action)


def arrange(parser: argparse.ArgumentParser, classes: Sequence[type], command: str) -> None:
    """Put the options of a parser into groups by the class that declares them."""
    parser.usage = f"distill-trainers {command} [RECIPE.yaml] [--SETTING VALUE …]"
    parser.formatter_class = _OneName
    owners = {field.name: _owner(cls, field.name) for cls in classes for field in fields(cls)}
    options: dict[str, list[argparse.Action]] = {}
    for action in list(parser._optionals._group_actions):
        if action.dest not in owners or action.const is False:  # `--no_x`, for a setting x that is true
            continue
        options.setdefault(owners[action.dest].__name__, []).append(action)
    order = sorted(options, key=lambda name: _LAST.index(name) if name in _LAST else -name.endswith("Arguments") - 1)
    if command == "train":
        parser.epilog = "Settings of another method: --method NAME --help. TRL's names of settings are taken, too."
    parser._optionals.title = "general"
    parser._optionals._group_actions[:] = [a for a in parser._optionals._group_actions if a.dest == "help"]
    for name in order:
        group = parser.add_argument_group(_TITLES.get(name, command if name.endswith("Arguments") else name))
        group._group_actions += options[name]


def _owner(cls: type, name: str) -> Any:
    """Find the class that declares a setting first; one that changes its default is not it."""
    return next(base for base in reversed(cls.__mro__) if name in getattr(base, "__dataclass_fields__", {}))
