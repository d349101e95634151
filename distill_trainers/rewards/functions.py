"""Reward functions by name: built-in checkers, functions of the user's, and functions of a module.

A function has TRL's signature: `f(prompts, completions, **columns)` with keywords, lists as long as there are samples,
and one number (or None, where it does not apply) for each. It may be a coroutine function.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..answers.checkers import NAMES, PLAIN, WITH_SETTING, Check, checker, reads_answer
from ..exceptions import ConfigurationError
from ..settings import shown

# Functions by the name that settings give them. A program adds rows of its own; trainers add what they are given.
REWARDS: dict[str, Callable[..., Any]] = {}

# What functions get besides the columns of rows.
GIVEN = frozenset({"prompts", "completions", "completion_ids", "trainer_state"})

_IN_MODULE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class RewardFunction:
    """A function, and what it is called.

    Attributes:
        name: as in logs and messages.
        call: with keywords.
        takes: the keywords that it takes; None takes all.
        requires: those among them without a default.
        is_checker: a built-in, which reads `Sample`s.
    """

    name: str
    call: Callable[..., Any]
    takes: frozenset[str] | None = None
    requires: frozenset[str] = frozenset()
    is_checker: bool = False


def check_names(names: Sequence[str], trusts_code: bool, setting: str = "reward_funcs") -> None:
    """Refuse names that stand for nothing, before anything is imported.

    Args:
        names: what the setting holds.
        trusts_code: whether code of others may run.
        setting: the setting that errors name.

    Raises:
        ConfigurationError: an unknown name, or one of a module where no code of others may run.
    """
    if not names:
        raise ConfigurationError(f"Got `{setting}: []`; expected at least one, or leave it out.")
    doubled = sorted({name for name in names if list(names).count(name) > 1})
    if doubled:
        raise ConfigurationError(f"Got `{setting}` with {doubled[0]!r} more than once; expected different ones.")
    for name in names:
        try:
            _check_name(name, trusts_code)
        except ConfigurationError as error:
            raise ConfigurationError(f"`{setting}`: {error}") from error


def _check_name(name: str, trusts_code: bool) -> None:
    if name in REWARDS:
        return
    if name.partition(":")[0] in {*PLAIN, *WITH_SETTING}:
        checker(name)
    elif not _IN_MODULE.fullmatch(name):
        raise ConfigurationError(
            f"Got the reward {shown(name, 80)!r}; expected one of {', '.join(NAMES)}, or `module:function`. Reward "
            "models are not loaded by name: write a function that asks yours."
        )
    elif not trusts_code:
        raise ConfigurationError(
            f"Got the reward {shown(name, 80)!r}, which runs code of that module; expected `trust_remote_code: "
            "true` beside it. Set it if you trust the recipe and the module."
        )


def reward_functions(names: Sequence[str]) -> list[RewardFunction]:
    """Return the functions of names that `check_names` has let through.

    Raises:
        ConfigurationError: a module or a function that is not there, or that cannot be called.
    """
    functions: list[RewardFunction] = []
    for name in names:
        function = _function(name)
        functions.append(replace(function, name=_untaken(function.name, {other.name for other in functions})))
    return functions


def named(given: Any) -> list[str]:
    """Return the names of what a trainer was given: a name, a callable, or a list of them; callables join `REWARDS`.

    Raises:
        ConfigurationError: anything else, such as a reward model.
    """
    listed = list(given) if isinstance(given, list | tuple) else [given]
    names: list[str] = []
    for one in listed:
        if isinstance(one, str):
            names.append(one)
            continue
        is_model = hasattr(one, "forward") and hasattr(one, "parameters")
        if not callable(one) or is_model:
            raise ConfigurationError(
                f"Got a {type(one).__name__} among `reward_funcs`; expected functions of prompts and completions, or "
                f"names ({', '.join(NAMES)}). Wrap a reward model in a function that asks it."
            )
        name = _untaken(getattr(one, "__name__", type(one).__name__), {*PLAIN, *WITH_SETTING, *names})
        REWARDS[name] = one
        names.append(name)
    return names


def _untaken(name: str, taken: Collection[str]) -> str:
    """Return the name, with a number where it is taken."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def _function(name: str) -> RewardFunction:
    if name in REWARDS:
        return _of_callable(name, REWARDS[name])
    if name.partition(":")[0] in {*PLAIN, *WITH_SETTING}:
        kind = name.partition(":")[0]
        return RewardFunction(kind, _over(checker(name)), is_checker=True)
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module of the user's may raise
        raise ConfigurationError(
            f"Got the reward {name!r}, but it cannot be imported ({type(error).__name__}: {shown(error)}); expected a "
            "function of a module that Python finds. Install it, or set PYTHONPATH to its folder."
        ) from error
    if not callable(function):
        raise ConfigurationError(f"Got the reward {name!r}, which is a {type(function).__name__}; expected a function.")
    return _of_callable(attribute, function)


def _of_callable(name: str, function: Callable[..., Any]) -> RewardFunction:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # one that is not written in Python
        return RewardFunction(name, function)
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if positional:
        raise ConfigurationError(
            f"The reward function {name!r} takes {positional[0]!r} by its place alone; expected keywords."
        )
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    required = frozenset(p.name for p in named if p.default is p.empty)
    return RewardFunction(name, function, None if takes_all else frozenset(p.name for p in named), required)


def _over(check: Check) -> Callable[..., list[float | None]]:
    return lambda samples: [check(sample) for sample in samples]


def needs_answers(names: Sequence[str]) -> bool:
    """Tell whether any of these compares with the right answer, which rows must bring."""
    return any(name not in REWARDS and reads_answer(name) for name in names)
