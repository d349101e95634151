"""Packages that settings need and that may not be installed: missed before anything is loaded, not after."""

from __future__ import annotations

import importlib.util
from typing import Any

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from ...exceptions import ConfigurationError
from ...installing import pip_install

# How the names of optimisers in transformers begin or end: module, and what to install.
_OPTIMIZERS = {
    "galore_": ("galore_torch", "galore-torch"),
    "apollo_": ("apollo_torch", "apollo-torch"),
    "schedule_free_": ("schedulefree", "schedulefree"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "adamw_apex": ("apex", "apex"),
    "adamw_torch_xla": ("torch_xla", "torch-xla"),
    "adamw_torch_npu": ("torch_npu", "torch-npu"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "stable_adamw": ("optimi", "torch-optimi"),
}
_BITSANDBYTES = ("adamw_bnb", "adamw_8bit", "paged_", "ademamix", "lion", "rmsprop_")
_TRACKERS = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}
_MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}  # those that transformers leaves out of what is available


def check_packages(args: Any) -> None:
    """Refuse trackers, optimisers and kernels whose package is not installed.

    Raises:
        ConfigurationError: naming the setting and what to install.
    """
    there = get_available_reporting_integrations() if args.report_to else []  # it looks for the package of each
    for name in args.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ConfigurationError(f"Got `report_to: {name}`; expected any of {known}, or none.")
        if name not in there and not _is_there(_MODULES.get(name, name)):
            _refuse("report_to", name, name, _pip(_TRACKERS.get(name, name)), "set `report_to: none`")
    optimizer = str(getattr(args.optim, "value", args.optim))
    module, package = next((p for start, p in _OPTIMIZERS.items() if optimizer.startswith(start)), ("", ""))
    if not module and optimizer.startswith(_BITSANDBYTES):
        module, package = "bitsandbytes", "bitsandbytes"
    if module and not _is_there(module):
        _refuse("optim", optimizer, module, _pip(package), "take another optimiser, such as `adamw_torch`")
    if args.use_liger_kernel and not _is_there("liger_kernel"):
        _refuse("use_liger_kernel", True, "liger_kernel", _pip("liger-kernel"), "leave it out")
    if args.quantize_student and not _is_there("torchao"):
        _refuse("quantize_student", args.quantize_student, "torchao", pip_install("quantize"), "leave it out")


def check_before_devices(args: Any) -> None:
    """Refuse what transformers would already need in order to read its own arguments.

    Raises:
        ConfigurationError: DeepSpeed is not installed.
    """
    if args.deepspeed and not _is_there("deepspeed"):
        _refuse("deepspeed", args.deepspeed, "deepspeed", pip_install("deepspeed"), "leave it out")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _pip(package: str) -> str:
    return f"pip install '{package}'"


def _refuse(name: str, value: Any, module: str, command: str, otherwise: str) -> None:
    raise ConfigurationError(f"Got `{name}: {value}`, but {module} is not installed; `{command}`, or {otherwise}.")
