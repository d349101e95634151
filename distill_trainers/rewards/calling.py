"""Calling reward functions: each within its time, and with a look at what it gives back."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import numbers
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..exceptions import RewardError
from ..settings import shown
from .functions import RewardFunction

# What libraries say of the thread that they run in, and what to set.
_WANTS = {
    "signal only works in main thread": "It wants the main thread: set `reward_timeout: null`, which calls it there "
    "without a limit of time.",
    "cannot be called from a running event loop": "It is async, and this thread runs a loop already, as notebooks do: "
    "set `reward_timeout` to seconds, which calls it in a thread of its own.",
}
_LARGEST = 1e30  # of a reward: advantages are differences of weighted ones, in float32, which ends at 3e38


def reward_values(
    function: RewardFunction, told: Mapping[str, Any], count: int, seconds: float | None
) -> list[float | None]:
    """Call a reward function for `count` samples.

    Args:
        told: what it may be given, by keyword; lists are as long as `count`.
        seconds: that it may take. It runs in a thread, which is left behind when its time is over: nothing ends a
            function that does not end. None takes any time, in the thread of the caller.

    Returns:
        a finite number for each sample; None where the function does not apply.

    Raises:
        RewardError: it raised, took too long, or gave back something else. The message names it.
    """
    missing = sorted(function.requires - told.keys())
    if missing:
        raise RewardError(
            f"The reward function {function.name!r} takes {missing[0]!r}, which no column of the rows is called; "
            f"expected some of {', '.join(sorted(told))}. Add the column, rename yours, or give it a default."
        )
    taken = (name for name in told if function.takes is None or name in function.takes)
    # Its own lists, or what it changes in them would be what the next function gets.
    given = {name: copy.deepcopy(told[name]) if isinstance(told[name], list) else told[name] for name in taken}
    outcome = _run(function, given) if seconds is None else _run_within(function, given, seconds)
    if isinstance(outcome, BaseException):
        raise _raised(function.name, outcome) from outcome
    return _checked(function.name, outcome, count)


def _run(function: RewardFunction, given: Mapping[str, Any]) -> Any:
    """What the function gives back, or what it raised."""
    try:
        value = function.call(**given)
        return asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value
    except (Exception, SystemExit, asyncio.CancelledError) as error:  # whatever a function of the user's may raise
        return error


async def _awaited(value: Any) -> Any:
    return await value


def _run_within(function: RewardFunction, given: Mapping[str, Any], seconds: float) -> Any:
    outcome: list[Any] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        if device is not None:  # threads begin on the first GPU, whichever this process has
            torch.cuda.set_device(device)
        outcome.append(_run(function, given))

    # A daemon: Python does not wait for it at its end, as it would for the threads of an executor.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if outcome:
        return outcome[0]
    if not thread.is_alive():
        raise RewardError(f"The reward function {function.name!r} has ended its thread; expected a list of numbers.")
    raise RewardError(
        f"The reward function {function.name!r} has not answered after {seconds:g} s (`reward_timeout`). Make it end "
        "by itself, as by time limits of its own requests, or raise `reward_timeout`."
    )


def _raised(name: str, error: BaseException) -> RewardError:
    hint = "".join(f" {hint}" for said, hint in _WANTS.items() if said in str(error))
    return RewardError(f"The reward function {name!r} raised {type(error).__name__}: {shown(error, 300)}.{hint}")


def _checked(name: str, values: Any, count: int) -> list[float | None]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"The reward function {name!r} gave back {_kind(values)}; expected a list of {count} numbers, one for each "
            "completion."
        )
    if len(values) != count:
        raise RewardError(
            f"The reward function {name!r} gave back {len(values)} values for {count} completions; expected one each."
        )
    return [_number(name, value, place) for place, value in enumerate(values)]


def _number(name: str, value: Any, place: int) -> float | None:
    found = value
    try:
        found = value.item() if hasattr(value, "item") else value
        if found is None:
            return None
        if isinstance(found, numbers.Real) and abs(float(found)) <= _LARGEST:  # NaN is not
            return float(found)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass  # an array of several, or an integer that no float holds
    raise RewardError(
        f"The reward function {name!r} gave {shown(found, 40)!r} ({type(found).__name__}) for completion {place + 1}; "
        f"expected a number of at most {_LARGEST:g}, or None where it does not apply."
    )


def _kind(value: Any) -> str:
    return "nothing (None)" if value is None else f"a {type(value).__name__}"


def totals(values: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[float | None]:
    """Sum up each sample's values `[functions][samples]` by weight, None where no function applies."""
    sums: list[float | None] = []
    for of_sample in zip(*values, strict=True):
        known = [weight * value for weight, value in zip(weights, of_sample, strict=True) if value is not None]
        sums.append(math.fsum(known) if known else None)
    return sums
