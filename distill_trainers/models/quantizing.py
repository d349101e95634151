"""A student of integers: rounded in each forward while it trains, and exported as torchao's, which transformers loads.

Weights of linear layers are rounded in groups of g neighbours in a row, with a scale and a zero point for each group:
q = clamp(round(w / s) + z), and w stands for (q - z) s. Between the smallest and the largest of a group and 0, all 2^b
integers are used (torchao's asymmetric mapping), so that nothing is clipped and the gradient passes straight through
(Bengio et al., arXiv 1308.3432). Distilled so, it is QAD (arXiv 2601.20088).

Not torchao's own fake quantisation: its symmetric mapping clips the largest weight of a group and stops its gradient
(int4 of SmolLM2-135M, groups of 32: 0.68 nats from the original before training, against 0.48), and its `QATConfig`
takes no asymmetric one.

Shapes: O rows and I columns of a weight; G = I / g groups of a row.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import causal_lm_of, head_module_of, unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BITS = {"int8": 8, "int4": 4}
_STORED = 1  # bytes of a value, of 4 bits too: torchao packs these for GPUs alone
_OF_GROUP = 4 + 1  # bytes of a scale and a zero point


def rounded(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to integers, as torchao does.

    Returns:
        Integers q `[O, I]`, scales s `[O, G]`, zero points z `[O, G]`, in the dtype of the weight.
    """
    groups = weight.reshape(len(weight), -1, group_size)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (most - least)).clamp(min=torch.finfo(weight.dtype).tiny)
    zero = (least - torch.round(low / scale)).clamp(least, most)
    values = (torch.round(groups * (1.0 / scale)) + zero).clamp(least, most)
    return values.view_as(weight), scale.squeeze(-1), zero.squeeze(-1)


def restored(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return what integers stand for, `[O, I]`; arguments as `rounded` returns them."""
    groups = values.view(*scale.shape, -1)
    return ((groups - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).view_as(values)


class _StraightThrough(torch.autograd.Function):
    """Rounded forward; the gradient of the rounded weight is that of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, group_size: int) -> Tensor:
        return restored(*rounded(weight, bits, group_size))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class FakeQuantizedLinear(nn.Linear):
    """A linear layer that computes with its weight rounded, and trains the weight itself.

    Made out of an `nn.Linear` by `fake_quantize`, in place: names, hooks and the weight stay.
    """

    bits: int
    group_size: int
    is_on: bool
    held: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.used_weight(), self.bias)

    def used_weight(self) -> Tensor:
        """Return what the layer multiplies with, `[O, I]`."""
        if not self.is_on:
            return self.weight
        if self.held is not None:
            return self.held
        return _StraightThrough.apply(self.weight, self.bits, self.group_size)


def body_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Find the linear layers of a causal LM that can be quantised, by name; not its head, and nothing of adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    causal_lm = causal_lm_of(model)
    head = head_module_of(causal_lm)
    of_adapters = tuple(f"{n}." for n, m in causal_lm.named_modules() if isinstance(m, BaseTunerLayer))
    kept = tuple(f"{n}." for n, m in causal_lm.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
    return {
        name: module
        for name, module in causal_lm.named_modules()
        if type(module) in (nn.Linear, FakeQuantizedLinear)
        and module is not head
        and not name.startswith(kept)
        and (not name.startswith(of_adapters) or name.endswith(".base_layer"))
    }


def fake_quantize(model: nn.Module, kind: str, group_size: int) -> None:
    """Let the linear layers of a model's body compute with rounded weights, in place.

    Args:
        kind: of `BITS`.
        group_size: g; it divides their widths.
    """
    for layer in body_linears(model).values():
        layer.__class__ = FakeQuantizedLinear
        layer.bits, layer.group_size, layer.is_on, layer.held = BITS[kind], group_size, True, None  # type: ignore[assignment]


def unquantized(model: nn.Module) -> nn.Module:
    """Undo `fake_quantize`, in place, and return the model."""
    for layer in _quantized_layers(model):
        layer.__class__ = nn.Linear  # type: ignore[assignment]
        for name in ("bits", "group_size", "is_on", "held"):
            layer.__dict__.pop(name)
    return model


def is_fake_quantized(model: nn.Module) -> bool:
    """Tell whether `fake_quantize` has changed it."""
    return bool(_quantized_layers(model))


def _quantized_layers(model: nn.Module) -> list[FakeQuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, FakeQuantizedLinear)]


@contextlib.contextmanager
def without_rounding(model: nn.Module) -> Iterator[None]:
    """Let a model compute, within it, with its weights as they are."""
    layers = [layer for layer in _quantized_layers(model) if layer.is_on]
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


@contextlib.contextmanager
def rounding_once(model: nn.Module) -> Iterator[None]:
    """Round weights once for all forwards within it, where no weight changes: at every token else."""
    layers = [layer for layer in _quantized_layers(model) if layer.is_on and layer.held is None]
    with torch.no_grad():
        for layer in layers:
            layer.held = layer.used_weight()
    try:
        yield
    finally:
        for layer in layers:
            layer.held = None


# ---- The export -----------------------------------------------------------------------------------------------------


def quantized_sizes(model: nn.Module, group_size: int) -> dict[str, int]:
    """Count bytes: of a whole model in float32, and of its folder once the linear layers of its body are integers.

    Returns:
        `float32` and `integers`, and how many `parameters` of how many `layers` are quantised.
    """
    layers = body_linears(model)
    adapters = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    all_of_it = sum(p.numel() for p in causal_lm_of(model).parameters() if id(p) not in adapters)
    parameters = sum(layer.weight.numel() for layer in layers.values())
    integers = 4 * (all_of_it - parameters) + parameters * _STORED + parameters // group_size * _OF_GROUP
    return {"float32": 4 * all_of_it, "integers": integers, "parameters": parameters, "layers": len(layers)}


def integer_copy(model: nn.Module) -> PreTrainedModel:
    """Return a student's causal LM, without adapters, with integers for the weights that `fake_quantize` rounds.

    All other weights are the student's own, not copied: it is there to be saved. `from_pretrained` reads its folder.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig, MappingType, PerGroup
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    from .sharding import whole_loading

    source: Any = causal_lm_of(model)
    layers: Any = body_linears(model)
    names = {name.removesuffix(".base_layer"): layer for name, layer in layers.items()}
    with torch.device("meta"), whole_loading():
        exported = type(source)(copy.deepcopy(source.config))
    exported.load_state_dict(_own_weights(unwrapped(model)), assign=True, strict=False)
    exported.tie_weights()
    bits, group_size = next((layer.bits, layer.group_size) for layer in names.values())
    dtype = getattr(torch, f"int{bits}")
    with torch.no_grad():
        for name, layer in names.items():
            values, scale, zero = (part.to("cpu") for part in rounded(layer.weight, bits, group_size))
            whole = (values.to(torch.int8), scale.contiguous(), zero.to(torch.int8))
            integers = IntxUnpackedToInt8Tensor(*whole, dtype, (1, group_size), torch.float32, None)
            exported.get_submodule(name).weight = nn.Parameter(integers, requires_grad=False)
    others = [n for n, m in exported.named_modules() if isinstance(m, nn.Linear) and n not in names]
    told = TorchAoConfig(
        IntxWeightOnlyConfig(dtype, PerGroup(group_size), MappingType.ASYMMETRIC), modules_to_not_convert=others
    )
    exported.config.quantization_config, exported.hf_quantizer = told, TorchAoHfQuantizer(told, pre_quantized=True)
    exported.generation_config = copy.deepcopy(getattr(source, "generation_config", None))
    return exported


def _own_weights(model: Any) -> dict[str, Tensor]:
    """Return weights and buffers of a model by their names without adapters."""
    from .adapters import is_peft

    state = causal_lm_of(model).state_dict()
    if not is_peft(model):
        return dict(state)
    adapters, own = set(model.peft_config), {}
    for name, tensor in state.items():
        parts = [part for part in name.split(".") if part not in ("base_layer", "original_module")]
        if not adapters & set(parts) and not any(part.startswith("lora_") for part in parts):
            own[".".join(parts)] = tensor
    return own
