"""PEFT adapters, and what is inside a stack of wrappers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..exceptions import ConfigurationError
from .whole import first_words, load_whole_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_peft(model: nn.Module) -> bool:
    from transformers.utils import is_peft_available

    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def add_adapter(model: PreTrainedModel, peft_config: Any, gradient_checkpointing: bool = False) -> nn.Module:
    """Wrap `model` with a new PEFT adapter (k-bit models are prepared first).

    Raises:
        ConfigurationError: the model already has an adapter, the method trains virtual tokens, the adapter names
            modules that the model does not have, or cannot be made on weights that ZeRO-3 has partitioned.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training
    from peft.tuners.lycoris_utils import LycorisConfig

    if is_peft(model):
        raise ConfigurationError(
            "Got a PeftModel together with `peft_config`. Pass the PeftModel alone to go on training its adapter, "
            "or `model.merge_and_unload()` first to start a new one."
        )
    if getattr(peft_config, "is_prompt_learning", False):
        raise ConfigurationError(
            f"{type(peft_config).__name__} trains virtual prompt tokens, which shift every position of the student "
            "against its teacher's. Use LoRA or another adapter of the weights."
        )
    if isinstance(peft_config, LycorisConfig) and any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ConfigurationError(
            f"Got {type(peft_config).__name__} under ZeRO-3; expected an adapter that does not read the shape of the "
            "base's weights, which are partitioned. Take LoRA, DoRA, IA3 or VeRA, or launch with ZeRO-2 or DDP."
        )
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    if peft_config.task_type == "CAUSAL_LM" and not hasattr(model, "prepare_inputs_for_generation"):
        peft_config = dataclasses.replace(peft_config, task_type=None)  # else PEFT wants to wrap the model's `generate`
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ConfigurationError(
            f"The adapter does not fit {type(model).__name__}: {error} Set `lora_target_modules` to names of its "
            "linear layers, or to `all-linear`."
        ) from error


def keep_4bit_trainable(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from putting 4-bit weights into a layout for inference, and put back those that are in it.

    On CPUs with AVX-512-BF16 its layers do so at their first forward in eval mode, for good. In that layout they pass
    no gradient on: after one evaluation, or one rollout, an adapter before them would get a gradient of 0.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        layer: Any = module
        layer.support_avx512bf16_for_cpu = False
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                layer.weight.data, layer.weight.quant_state
            )
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside any stack of DDP, FSDP and DeepSpeed wrappers; a PeftModel stays one."""
    # Wrappers pass attribute look-ups on, so ask for their own submodules.
    while (inner := model._modules.get("module")) is not None and not is_peft(model):
        model = inner
    return model


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """Return the causal LM inside any stack of PEFT, DDP, FSDP and DeepSpeed wrappers."""
    model = unwrapped(model)
    return model.get_base_model() if is_peft(model) else model  # type: ignore[return-value, operator]


def head_module_of(causal_lm: Any) -> nn.Module | None:
    """Return the module that turns hidden states into logits; None where the model does not name one."""
    module: Any = getattr(causal_lm, "get_output_embeddings", lambda: None)()
    # PEFT's modules_to_save keeps a trained copy beside the frozen original.
    if hasattr(module, "modules_to_save") and getattr(module, "disable_adapters", False):
        return module.original_module
    active = getattr(module, "active_adapters", None)
    if hasattr(module, "modules_to_save") and active:
        return module.modules_to_save[active[0]]
    return module


def with_frozen_adapters(model: Any, sources: Mapping[str, str]) -> nn.Module:
    """Put adapters on a base that they share.

    Args:
        sources: folder or Hub id of each, by the name that it gets in the PEFT model.

    Raises:
        ConfigurationError: one cannot be read, is not whole, or does not fit the base.
    """
    from peft import PeftConfig, get_peft_model

    peft: Any = None
    for name, source in sources.items():
        what = f"The adapter {source!r} of a teacher"
        try:
            if peft is None:
                config = PeftConfig.from_pretrained(source)
                if getattr(config, "is_prompt_learning", False):
                    raise ConfigurationError(
                        f"{what} is a {type(config).__name__}, which adds virtual tokens; expected LoRA or another "
                        "adapter of the weights."
                    )
                config.inference_mode = True
                peft = get_peft_model(model, config, adapter_name=name)
            load_whole_adapter(peft, source, name, what)
        except ConfigurationError:
            raise
        except Exception as error:  # damaged files fail in many ways
            raise ConfigurationError(
                f"{what} cannot be loaded: {first_words(error)}. Expected a folder or Hub id of an adapter on the base "
                f"{getattr(model.config, '_name_or_path', '')!r}."
            ) from error
    return model if peft is None else peft


@contextlib.contextmanager
def answering_with(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Let a PEFT model, within it, answer with `adapter` alone or, with None, as its base; no second copy.

    PEFT's own `disable_adapter` and `set_adapter` also switch `requires_grad` of the adapters, and leave all of them
    trainable, which wrappers and optimisers must not see.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            # A copy that `modules_to_save` trains belongs to one adapter; others use the original.
            absent = isinstance(layer, AuxiliaryTrainingWrapper) and adapter not in layer._adapters
            layer._disable_adapters = adapter is None or absent
            layer._active_adapter = [adapter] if adapter is not None and not absent else layer._active_adapter
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


@contextlib.contextmanager
def naming_base(model: nn.Module, base: str) -> Iterator[None]:
    """Let adapters that are saved within it name another base, by folder or Hub id."""
    configs: Any = list(unwrapped(model).peft_config.values())  # type: ignore[operator]
    before = [config.base_model_name_or_path for config in configs]
    try:
        for config in configs:
            config.base_model_name_or_path = base
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config.base_model_name_or_path = name


def load_adapter(model: nn.Module, source: str) -> str:
    """Name a frozen adapter of a PEFT model: one it has by that name, or one loaded from a folder or the Hub.

    Raises:
        ConfigurationError: it is the adapter that trains, cannot be loaded, or does not fit.
    """
    peft: Any = unwrapped(model)
    if source == peft.active_adapter:
        raise ConfigurationError(
            f"Got `teacher_adapter: {source}`, which is the adapter that trains; expected another one of the student's "
            f"({', '.join(n for n in peft.peft_config if n != source) or 'it has none'}), or a folder or Hub id."
        )
    name = source
    if source not in peft.peft_config:
        name = next(n for n in ("teacher", "teacher_adapter") if n not in peft.peft_config)
        try:
            load_whole_adapter(peft, source, name, f"Got `teacher_adapter: {source}`, but it")
        except ConfigurationError:
            raise
        except Exception as error:  # damaged files fail in many ways
            raise ConfigurationError(
                f"Got `teacher_adapter: {source}`; expected one of the student's adapters "
                f"({', '.join(peft.peft_config)}), or a folder or Hub id of an adapter on the same base: "
                f"{first_words(error)}"
            ) from error
    for key, parameter in peft.named_parameters():
        if name in key.split("."):
            parameter.requires_grad_(False)
    return name
