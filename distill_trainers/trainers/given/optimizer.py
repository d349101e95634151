"""Schedules and optimisers whose arguments they do not take: tried on one number, before anything is loaded."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from ...exceptions import ConfigurationError
from ...settings import require, shown

# What torch, transformers and the packages of optimisers raise at arguments that they do not take.
_REFUSALS = (ArithmeticError, AttributeError, AssertionError, LookupError, TypeError, ValueError)
_OF_THE_RUN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}


def check_schedule(args: Any) -> None:
    """Make the schedule for one number and read its rates.

    Raises:
        ConfigurationError: `lr_scheduler_kwargs` that it does not take, or lacks, or rates that are no numbers.
    """
    kind, given = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    make: Any = TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]
    known = inspect.signature(make).parameters
    takes = ", ".join(name for name in known if name not in _OF_THE_RUN and kind not in ("constant", "greedy"))
    expected = f"arguments of `lr_scheduler_type: {kind}`, which takes {takes or 'none'}"
    # transformers hands none on to the two constant schedules, and says nothing.
    require(not given or "constant" not in kind, "lr_scheduler_kwargs", given, expected)
    warmup = args.get_warmup_steps(100)
    steps = warmup + 100
    try:
        schedule = get_scheduler(kind, _optimizer(torch.optim.SGD, lr=args.learning_rate), warmup, steps, given)
        factors = [of(step) for of in getattr(schedule, "lr_lambdas", []) for step in (0, warmup, steps // 2, steps)]
        finite = all(math.isfinite(factor) for factor in factors)
    except _REFUSALS as error:
        raise ConfigurationError(
            f"Got `lr_scheduler_kwargs: {shown(given)}` and `learning_rate: {args.learning_rate:g}`; expected "
            f"{expected}. It says: {shown(error, 300)}"
        ) from error
    require(finite, "lr_scheduler_kwargs", given, f"{expected}, and gives no finite rates with these")


def check_optimizer(args: Any) -> None:
    """Read `optim_args` as transformers will, and make the optimiser for one number.

    Raises:
        ConfigurationError: arguments that the optimiser does not take, or that transformers never hands on to it.
    """
    if not args.optim_args:
        return
    name, kind = "optim_args", args.optim.value
    pairs = [part.partition("=") for part in args.optim_args.replace(" ", "").split(",")]
    require(all(key and equals for key, equals, _ in pairs), name, args.optim_args, "`key=value, key=value`")
    try:
        usual = _arguments(args, "")
    except (*_REFUSALS, ImportError):
        return  # it needs the model, or a package that is missed elsewhere
    for key, _, _ in pairs:
        try:
            read = repr(_arguments(args, f"{key}=?")) != repr(usual)
        except _REFUSALS:
            read = True
        require(read, name, args.optim_args, f"arguments of `optim: {kind}`; transformers reads no {key!r} for it")
    try:
        factory, arguments = _arguments(args, args.optim_args)
        if inspect.isclass(factory):
            _optimizer(factory, **arguments)
    except _REFUSALS as error:
        raise ConfigurationError(
            f"Got `optim_args: {shown(args.optim_args)}`; expected arguments of `optim: {kind}`. It says: "
            f"{shown(error, 300)}"
        ) from error


def _arguments(args: Any, optim_args: str) -> tuple[Any, dict[str, Any]]:
    changed = copy.copy(args)
    changed.optim_args = optim_args
    return Trainer.get_optimizer_cls_and_kwargs(changed)


def _optimizer(kind: Any, **arguments: Any) -> Any:
    return kind([torch.nn.Parameter(torch.zeros(1))], **arguments)
