"""Configs of TRL, of transformers or of another method, passed as `args`: what is carried over, and what is refused."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

from ...exceptions import ConfigurationError
from ...trl_names import HARMLESS, REFUSED

logger = logging.getLogger(__name__)

_FILLED_IN = {"generation_batch_size", "steps_per_generation"}  # by TRL itself; a rollout is of one optimiser step here
# TRL's modes of the correction for vLLM; those of whole sequences have no counterpart.
_CORRECTIONS = {"token_truncate": "truncate", "token_mask": "mask"}
_CORRECTS = "vllm_importance_sampling_"
_LIBRARIES = ("trl", "transformers", "distill_trainers")


def carried(args: TrainingArguments, config_class: type[Any], shared: Collection[str]) -> dict[str, Any]:
    """Return the settings of `args` by the names of `config_class`.

    Args:
        config_class: the `DistillConfig` of a method.
        shared: settings that mean the same to all methods. Those of one method are carried over only from configs that
            the method `stands_for`: `beta` of GKD is not that of DPO.

    Raises:
        ConfigurationError: a setting was changed that would change what is trained, but has no counterpart.
    """
    classes = {cls.__name__ for cls in type(args).__mro__}
    known = {f.name for f in fields(config_class) if f.init} if classes & config_class.stands_for else shared
    given = {f.name: getattr(args, f.name) for f in fields(args) if f.init}
    values = {name: value for name, value in given.items() if name in known}
    changed = {f.name: given[f.name] for f in fields(args) if f.init and f.name not in known and _is_changed(f, given)}
    values |= config_class.taken_from(args, changed)
    if (column := changed.pop("dataset_text_field", None)) is not None:
        values["column_mapping"] = {**(values.get("column_mapping") or {}), column: "text"}
    if (revision := changed.pop("teacher_model_revision", None)) is not None:
        values["teacher_model_init_kwargs"] = {**(values.get("teacher_model_init_kwargs") or {}), "revision": revision}
    if "shuffle_dataset" in changed and not changed.pop("shuffle_dataset"):
        values["train_sampling_strategy"] = "sequential"
    values |= _correction(args, changed) | _vllm(changed)
    for name, value in changed.items():
        _name_what_is_lost(name, value, type(args), config_class.__name__)
    return values


def _is_changed(field: Field[Any], given: dict[str, Any]) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return field.name not in _FILLED_IN and given[field.name] != default


def _correction(args: TrainingArguments, changed: dict[str, Any]) -> dict[str, Any]:
    """Take TRL's settings of its correction for vLLM's probabilities out of `changed`; they act with vLLM alone.

    A mode of whole sequences stays there, to be refused; TRL's default is one, and is off here.
    """
    given = {name.removeprefix(_CORRECTS): changed[name] for name in changed if name.startswith(_CORRECTS)}
    mode, off = given.get("mode"), not (getattr(args, "use_vllm", False) and given.get("correction", True))
    if off or mode in _CORRECTIONS:
        for name in given:
            del changed[_CORRECTS + name]
    if off or mode not in _CORRECTIONS:
        return {}
    bounds = {end: getattr(args, f"{_CORRECTS}clip_{end}") for end in ("min", "max")}
    return {"sampler_correction": _CORRECTIONS[mode]} | {f"sampler_ratio_{end}": at for end, at in bounds.items()}


def _vllm(changed: dict[str, Any]) -> dict[str, Any]:
    """Take TRL's settings of vLLM out of `changed`: those of its engine have their own names here."""
    uses = changed.pop("use_vllm", False)
    names = [name for name in changed if name.startswith("vllm_") and name not in REFUSED]
    arguments = {name.removeprefix("vllm_"): changed.pop(name) for name in names}
    for name in ("sync_frequency", "group_port"):  # weights are sent before each rollout, and through a folder
        arguments.pop(name, None)
    if "max_model_length" in arguments:
        arguments["max_model_len"] = arguments.pop("max_model_length")
    return {"rollout_engine": "vllm", "vllm_kwargs": {"mode": "colocate", **arguments}} if uses else {}


def _name_what_is_lost(name: str, value: Any, theirs: type, ours: str) -> None:
    owner = next(cls for cls in theirs.__mro__ if name in inspect.get_annotations(cls))
    what = f"Got `{name}: {value}` in a {theirs.__name__}"
    if name in HARMLESS or owner.__module__.partition(".")[0] not in _LIBRARIES:
        logger.warning("%s, which has no effect here: %s.", what, HARMLESS.get(name, f"it is no setting of {ours}"))
        return
    remedy = REFUSED.get(name, f"leave it at its default, or pass a {ours}")
    raise ConfigurationError(f"{what}, which has no counterpart in {ours}; expected its default. Instead: {remedy}.")
