"""Running a model up to its last hidden states inside its wrapper, and its output head."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..exceptions import ConfigurationError
from ..losses.reduction import widest
from ..signals import Head
from .adapters import causal_lm_of, head_module_of
from .compiling import uncompiled
from .experts import AUX_LOSS
from .inputs import evaluating, for_kernels, output_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnHidden = Callable[[Tensor, Head], Any]


def install_token_forward(model: nn.Module) -> nn.Module:
    """Teach the causal LM inside `model` the keyword `on_hidden`.

    `wrapper(input_ids=…, on_hidden=f)` runs the backbone and returns `f(last_hidden_state, head)`; without the keyword
    nothing changes. With `with_balance=True` it returns that and the balance term of a mixture of experts, or None.
    Since `f` runs inside the forward of the *wrapped* model, autocast applies to the backbone, DDP and FSDP see the
    graph, and under ZeRO-3 the head's weight is whole (`f` runs inside the head module's own call).
    Must be called before the model is wrapped, because accelerate wraps the forward it finds.
    """
    causal_lm: Any = causal_lm_of(model)  # it gets attributes of ours
    if "_distill_original_forward" in causal_lm.__dict__:
        return model
    causal_lm._distill_original_forward = causal_lm.forward

    @functools.wraps(type(causal_lm).forward)  # keeps the signature that `generate` and PEFT inspect
    def forward(self, *args: Any, on_hidden: OnHidden | None = None, with_balance: bool = False, **kwargs: Any) -> Any:
        if on_hidden is None:
            return self._distill_original_forward(*args, **kwargs)
        # PEFT passes labels, return_dict and the like along as None. A cache would keep keys and values for nothing.
        inputs = {k: v for k, v in kwargs.items() if v is not None and k not in ("labels", "return_dict")}
        ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))

        def on_rows(hidden: Tensor, head: Head) -> Any:
            return on_hidden(hidden if ids is None else hidden.reshape(*ids.shape, -1), head)

        inputs = {"use_cache": False, **for_kernels(self, inputs)}
        if with_balance:
            return _with_balance(self, args, inputs, on_rows)
        hidden = self.base_model(*args, **inputs).last_hidden_state
        with _head_calls(self, lambda hidden: on_rows(hidden, read_head(self))) as head_module:
            return head_module(hidden)

    causal_lm.forward = MethodType(forward, causal_lm)  # a bound method, so that deepcopy binds it to the copy
    return model


def without_token_forward(model: Any) -> Any:
    """Undo `install_token_forward`."""
    causal_lm: Any = causal_lm_of(model)
    for name in ("forward", "_distill_original_forward", "_distill_head_is_known"):
        causal_lm.__dict__.pop(name, None)
    return model


def gives_hidden_states(model: nn.Module) -> bool:
    """Tell whether `on_hidden` is installed, and the head is one product whose logits this package rebuilds.

    What a model that is not known here does to its logits is found out by `head_reproduces_logits`; it is remembered
    with the model, since it takes two forwards.
    """
    causal_lm: Any = causal_lm_of(model)
    if "_distill_original_forward" not in causal_lm.__dict__ or not head_is_fusable(model):
        return False
    if "_distill_head_is_known" not in causal_lm.__dict__:
        ids = torch.arange(4, device=next(causal_lm.parameters()).device).unsqueeze(0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        causal_lm._distill_head_is_known = head_reproduces_logits(model, inputs)
    return causal_lm._distill_head_is_known


def _with_balance(causal_lm: Any, args: Any, inputs: dict[str, Any], on_hidden: OnHidden) -> tuple[Any, Tensor | None]:
    """Let the model's own forward run, with `on_hidden` in the place of its head: it knows its balance term best."""
    results = []

    def instead(hidden: Tensor) -> Tensor:
        results.append(on_hidden(hidden, read_head(causal_lm)))
        return hidden.new_zeros((*hidden.shape[:-1], 1))  # logits that nobody reads

    with _head_calls(causal_lm, instead):
        output = causal_lm._distill_original_forward(*args, **inputs, output_router_logits=True)
    return results[0], getattr(output, AUX_LOSS, None)


@contextlib.contextmanager
def _head_calls(causal_lm: PreTrainedModel, function: Callable[[Tensor], Any]) -> Iterator[nn.Module]:
    """Let the head module's own call run `function`, within it: by its hooks ZeRO-3 gathers the head's weight."""
    module = _head_module(causal_lm)
    instance_forward = module.__dict__.get("forward")
    module.forward = function
    try:
        yield module
    finally:
        if instance_forward is None:
            del module.forward
        else:
            module.forward = instance_forward


def _head_module(causal_lm: PreTrainedModel) -> nn.Module:
    module = head_module_of(causal_lm)
    if module is None:
        raise ConfigurationError(f"{type(causal_lm).__name__} has no output embeddings; a causal LM was expected.")
    return module


def logit_rows(model: nn.Module) -> int:
    """Return the number of ids that the model gives logits for."""
    causal_lm = causal_lm_of(model)
    weight = getattr(head_module_of(causal_lm), "weight", None)  # a PEFT layer's is its base layer's
    return causal_lm.config.get_text_config().vocab_size if weight is None else weight.shape[0]


def read_head(causal_lm: PreTrainedModel) -> Head:
    """Return the output head with all that the model does to its logits; its weight must be whole."""
    module = _head_module(causal_lm)
    config = causal_lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is None and getattr(config, "logits_scaling", None):  # Granite
        scale = 1.0 / config.logits_scaling
    if scale is None:
        scale = getattr(config, "lm_head_multiplier", None)  # Falcon-H1
    return Head(
        weight=_head_weight(module),
        bias=getattr(getattr(module, "base_layer", module), "bias", None),
        scale=float(scale) if scale is not None else 1.0,
        soft_cap=getattr(config, "final_logit_softcapping", None),  # Gemma 2
    )


def _head_weight(module: nn.Module) -> Tensor:
    """The head's effective weight; a LoRA on the head is added to it, so that it is trained and not ignored."""
    base = getattr(module, "base_layer", None)
    if base is None:
        return module.weight  # type: ignore[return-value]
    weight = base.weight
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return weight
    for adapter in module.active_adapters:  # type: ignore[union-attr]
        if adapter in module.lora_A:  # type: ignore[operator]
            weight = weight + module.get_delta_weight(adapter).to(weight.dtype)  # type: ignore[operator]
    return weight


def head_is_fusable(model: nn.Module) -> bool:
    """Tell whether the head is one matrix product: a Linear, or a plain LoRA on one (no dropout, no DoRA)."""
    module: Any = head_module_of(causal_lm_of(model))
    if isinstance(module, nn.Linear) and not hasattr(module, "base_layer"):
        return True
    base = getattr(module, "base_layer", None)
    if not isinstance(base, nn.Linear) or not hasattr(module, "lora_A") or hasattr(base.weight, "ds_id"):
        return False
    dropout = any(not isinstance(layer, nn.Identity) for layer in module.lora_dropout.values())
    variants = bool(getattr(module, "lora_variant", None)) or any(getattr(module, "use_dora", {}).values())
    return not dropout and not variants


@torch.no_grad()
def head_reproduces_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Tell whether hidden states and `Head` give the model's own logits on `inputs`: logit changes may be unknown.

    Runs `model` (wrapped or not) twice on a few tokens. Collective under ZeRO-3 and FSDP.
    """
    causal_lm = causal_lm_of(model)
    if causal_lm.base_model is causal_lm:  # its backbone goes by a name that its class does not tell
        return False
    sample = {name: value[:1, :16] for name, value in inputs.items()}
    if any(value.ndim != 2 for value in inputs.values()):  # of a kind that cannot be cut with the tokens, as images are
        sample = dict(inputs)
    full_precision = True

    def rebuild(hidden: Tensor, head: Head) -> Tensor | None:
        nonlocal full_precision
        if hidden.shape[-1] != head.weight.shape[-1]:  # something lies between them, as in Electra and RemBERT
            return None
        autocast = torch.is_autocast_enabled(hidden.device.type)
        full_precision = not autocast and {hidden.dtype, head.weight.dtype} <= {torch.float32, torch.float64}
        return head.logits(hidden[0])

    with uncompiled(), evaluating(model):  # one row and a cache are not what layers are compiled for
        rebuilt = model(**sample, on_hidden=rebuild)
        expected = output_of(model, sample).logits[0]
    if rebuilt is None:
        return False
    rebuilt, expected = widest(rebuilt[:, : expected.shape[-1]]), widest(expected)
    mask = sample.get("decoder_attention_mask", sample.get("attention_mask"))
    keep = slice(None) if mask is None else mask[0].bool()
    error = (rebuilt - expected)[keep].norm() / expected[keep].norm().clamp_min(1e-30)
    return bool(error < (1e-3 if full_precision else 0.05))  # bfloat16 rounding stays near 0.01


def has_dropout(model: nn.Module) -> bool:
    """Tell whether anything of the model drops values while it trains (see `disable_dropout`)."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        if any("dropout" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items()):
            return True
    return False


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to zero: modules, and the probabilities that attention layers pass to kernels."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
