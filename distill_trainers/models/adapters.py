"""PEFT adapters, and what is inside a stack of wrappers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..exceptions import ConfigurationError

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
        ConfigurationError: the model already has an adapter, the method trains virtual tokens, or the adapter names
            modules that the model does not have.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

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
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ConfigurationError(
            f"The adapter does not fit {type(model).__name__}: {error} Set `lora_target_modules` to names of its "
            "linear layers, or to `all-linear`."
        ) from error


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside any stack of DDP, FSDP and DeepSpeed wrappers; a PeftModel stays one."""
    # Wrappers pass attribute look-ups on, so ask for their own submodules.
    while (inner := model._modules.get("module")) is not None and not is_peft(model):
        model = inner
    return model


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside any stack of PEFT, DDP, FSDP and DeepSpeed wrappers."""
    model = unwrapped(model)
    return model.get_base_model() if is_peft(model) else model  # type: ignore[return-value, operator]
