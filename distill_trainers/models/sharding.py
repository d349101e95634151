"""What is whole and what is sharded: ZeRO-3 and FSDP2."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments


def zero_stage(accelerator: Accelerator) -> int | None:
    """Return DeepSpeed's ZeRO stage, or None without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else plugin.zero_stage


def fsdp_version(accelerator: Accelerator) -> int | None:
    """Return FSDP's version, or None without FSDP."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return None if plugin is None else getattr(plugin, "fsdp_version", 1)


def forget_dataloader(accelerator: Accelerator, loader: Any) -> None:
    """Take a loader of evaluation rows off accelerate's list, which keeps those of every evaluation until training."""
    accelerator._dataloaders = [kept for kept in accelerator._dataloaders if kept is not loader]


def keep_optimizer(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Let DeepSpeed step with `optimizer` also where its states are offloaded to the CPU.

    accelerate puts DeepSpeed's CPU Adam in the place of all others, SGD among them, and says nothing.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    has_cpu_form = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.Adagrad)
    if plugin is None or has_cpu_form or type(optimizer).__module__.startswith("bitsandbytes"):
        return
    plugin.deepspeed_config.setdefault("zero_force_ds_cpu_optimizer", False)


def launched_with_fsdp() -> bool:
    """Tell whether the launcher's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def let_fsdp_shard_on_cpu(args: TrainingArguments) -> None:
    """Make accelerate shard by FSDP also on CPUs; to be called right before the accelerator is made.

    `AcceleratorState` takes FSDP up for processes on accelerators alone. Those of `use_cpu` are `MULTI_CPU`, and it
    would wrap their model in DDP without a word, although `fully_shard` works with gloo.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    with_fsdp = launched_with_fsdp() or args.fsdp_plugin_args is not None
    state = PartialState._shared_state
    if with_fsdp and state.get("distributed_type") is DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU  # it makes FSDP of this; the device is chosen by now


@contextlib.contextmanager
def whole_loading() -> Iterator[None]:
    """Let `from_pretrained`, within it, load whole weights on this process also when ZeRO-3 is configured."""
    from transformers.integrations import deepspeed as integration

    # While this reference names ZeRO-3, transformers partitions what it loads, and refuses a `device_map`.
    reference = integration._hf_deepspeed_config_weak_ref
    integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


@contextlib.contextmanager
def whole_parameters(*parameters: Tensor | None) -> Iterator[None]:
    """Keep the given parameters, within it, whole on every process. Free of cost where they already are."""
    partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of an FSDP2 shard (collective); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def checkpoint_tensors(causal_lm: Any, untied_head: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight and buffer by its name in a checkpoint, whole (collective under ZeRO-3 and FSDP2).

    One that is shared comes once, by its first name.

    Args:
        untied_head: give the head's weight too, where it is the embedding's.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # Experts that transformers fused while loading get the names back under which they are published.
    converted = getattr(causal_lm, "_weight_conversions", None)
    seen: set[int] = set()
    for name, tensor in causal_lm.state_dict(keep_vars=True).items():
        if id(tensor) in seen and not untied_head:
            continue
        seen.add(id(tensor))
        with whole_parameters(tensor):
            whole_tensor = {name: whole(tensor.detach())}
            yield from (revert_weight_conversion(causal_lm, whole_tensor) if converted else whole_tensor).items()


def must_stay_in_step(model: nn.Module) -> bool:
    """Tell whether a forward of `model` may wait for other processes (ZeRO-3, FSDP2): all run equally many then."""
    from torch.distributed.fsdp import FSDPModule

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return False
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return partitioned or any(isinstance(module, FSDPModule) for module in model.modules())
