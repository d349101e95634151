"""Where a frozen model's weights are, whatever the launch does to the model that trains: loading it, and preparing it.

Names of placements are those of `teachers/placement.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..exceptions import ConfigurationError
from .adapters import causal_lm_of
from .compiling import compile_as_student
from .loading import dtype_of, load_config, which_files
from .sharding import fsdp_version, launched_with_fsdp, whole_loading, zero_stage

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

ZERO3 = ("zero3", "zero3_offload")


def placement_of_launch() -> str:
    """Say what the launch does with models loaded now: `zero3`, `fsdp2` or `replicate`."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        return "zero3"
    return "fsdp2" if launched_with_fsdp() and os.environ.get("FSDP_VERSION") == "2" else "replicate"


@contextlib.contextmanager
def loading_placed(
    name: str, placement: str, device: torch.device, init_kwargs: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Let `load_causal_lm(name, **yielded)`, within it, put weights where `placement` says, shard by shard.

    `zero3` partitions each weight as it is made, and the main process reads the files; `fsdp2` makes the model on the
    meta device, and each process reads its own rows. Files are mapped, so what is read of them can leave memory again.

    Args:
        init_kwargs: of `from_pretrained`; what is yielded has those that the placement adds.
    """
    kwargs = dict(init_kwargs)
    if placement == "auto" and not {"quantization_config", "device_map"} & kwargs.keys():
        placement = placement_of_launch()
    if placement == "auto":
        yield kwargs
    elif placement in ZERO3 and partitions(placement):
        config = load_config(name, "teacher", **which_files(kwargs))
        with _zero3_loading(_zero3_settings(config, dtype_of(kwargs.get("dtype"), config), placement)):
            yield kwargs
    elif placement == "fsdp2" and partitions(placement):
        from transformers.distributed import DistributedConfig

        with whole_loading():
            yield {**kwargs, "distributed_config": DistributedConfig(fsdp_size=torch.distributed.get_world_size())}
    else:
        with whole_loading():
            yield {**kwargs, **_whole_kwargs(name, placement, device, kwargs)}


def _whole_kwargs(name: str, placement: str, device: torch.device, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if placement == "device_map":
        return {"device_map": kwargs.get("device_map", "auto")}
    if not placement.startswith("quantized"):
        return {}
    from transformers import BitsAndBytesConfig

    dtype = dtype_of(kwargs.get("dtype"), load_config(name, "teacher", **which_files(kwargs)))
    if placement == "quantized-8bit":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return {"quantization_config": quantization, "device_map": {"": device}, "dtype": dtype}


def partitions(placement: str) -> bool:
    """Tell whether a placement splits or moves weights here: in one process, only offloading does.

    Raises:
        ConfigurationError: there is no process group, which DeepSpeed needs also in one process.
    """
    if placement == "zero3_offload":
        if not torch.distributed.is_initialized():
            raise ConfigurationError(
                "Got `teacher_placement: zero3_offload` in a process that no launcher has started, as DeepSpeed needs. "
                "Start it with `accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes "
                "1`, or take `device_map` with `max_memory`."
            )
        return True
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def prepare_frozen(model: nn.Module, accelerator: Accelerator, placement: str = "auto") -> nn.Module:
    """Freeze `model`, put it in eval mode and place it; `auto` does what the launch does with the model that trains.

    `zero3`: an inference engine of its own, without optimiser, that gathers parameters layer by layer; in
    `zero3_offload` from the CPU's memory. `fsdp2`: sharded layer by layer. Otherwise: whole on every process.

    Raises:
        ConfigurationError: the weights are partitioned already, and were to be whole.
    """
    model.requires_grad_(False)
    model.eval()
    if placement == "auto":
        placement = "zero3" if zero_stage(accelerator) == 3 else "replicate"
        placement = "fsdp2" if fsdp_version(accelerator) == 2 else placement
    if placement in (*ZERO3, "fsdp2") and not partitions(placement):
        logger.warning(
            "`teacher_placement: %s` with one process: there is nobody to share its weights with.", placement
        )
        placement = "replicate"
    if placement in ZERO3:
        return _zero3_engine(model, placement)
    if placement == "fsdp2":
        return _fully_sharded(model, accelerator)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigurationError(
            f"Got `teacher_placement: {placement}` with a teacher whose weights ZeRO-3 has partitioned already. Pass "
            "it by name, or set `teacher_placement: zero3`."
        )
    compile_as_student(model, accelerator)
    if not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):
        model.to(accelerator.device)
    return model


# ---- ZeRO-3 ---------------------------------------------------------------------------------------------------------


def _zero3_settings(config: Any, dtype: torch.dtype, placement: str) -> dict[str, Any]:
    """DeepSpeed's settings for a model that only answers: one layer and the next are whole at a time, no more."""
    width = config.get_text_config().hidden_size
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        # About two layers. Each module, also one without weights, fetches one weight ahead: without a limit that goes
        # faster than weights are used, and in the middle of a deep model a third of it is whole.
        "stage3_max_live_parameters": 24 * width * width,
        "stage3_param_persistence_threshold": 10 * width,  # norms and biases stay whole
        "stage3_max_reuse_distance": 0,  # a weight that is used twice is gathered twice
    }
    if placement == "zero3_offload":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    halves = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if dtype in halves:
        settings[halves[dtype]] = {"enabled": True}  # its own dtype, whatever the model that trains has
    return settings


@contextlib.contextmanager
def _zero3_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Within it, transformers partitions what it loads by `settings`, whether or not the launch is DeepSpeed's."""
    from transformers.integrations import deepspeed as integration

    _choose_deepspeed_accelerator()
    reference = integration._hf_deepspeed_config_weak_ref
    held = integration.HfDeepSpeedConfig(settings)  # transformers refers to it weakly: unheld, it is gone at once
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference
        del held


def _zero3_engine(model: nn.Module, placement: str) -> nn.Module:
    causal_lm = causal_lm_of(model)
    settings = _zero3_settings(causal_lm.config, causal_lm.dtype, placement)
    _choose_deepspeed_accelerator()
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine


def _choose_deepspeed_accelerator() -> None:
    if not torch.cuda.is_available():  # DeepSpeed would go by installed packages (`torch_npu`, …), device or not
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


# ---- FSDP2 ----------------------------------------------------------------------------------------------------------


def _fully_sharded(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Each layer of a list of layers is gathered when it runs and freed after it, and so is all that is left over."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    causal_lm = causal_lm_of(model)
    if isinstance(causal_lm, FSDPModule):  # as transformers loaded it: the head stays whole after a forward
        causal_lm.set_reshard_after_forward(True)
        return model
    model.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layers in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # a root's embedding and head stay whole by default
    return model
