"""How much the parts of a model matter on some text, by what passes through them: the importance of widths.

Minitron (arXiv 2407.14679, section 2.2), with the weights that read each part taken in. Shapes: B rows, T tokens, N
attended tokens, D hidden channels, F feed-forward units, H width of all heads, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..exceptions import ConfigurationError
from .families import Family, family_of, place_of
from .layer_importance import Batch
from .shapes import Shape, shape_of


@dataclass
class Importance:
    """Larger is more important; lists by layer where a layer has its own.

    Args:
        layers: KL of the model to itself without that layer, in nats per token; empty where it was not measured.
        units: sqrt(Σ a²) · ‖W[:, i]‖ of each feed-forward unit, a its activation and W the product that reads it.
        groups: sqrt(Σ ‖o‖²) of each key-value head with its query heads, o what they add to the residual stream.
        channels: mean |output| of all norms over hidden channels.
        experts: share of the routing weights.
        tokens: that were measured.
    """

    layers: list[float] = field(default_factory=list)
    units: list[list[float]] = field(default_factory=list)
    groups: list[list[float]] = field(default_factory=list)
    channels: list[float] = field(default_factory=list)
    experts: list[list[float]] = field(default_factory=list)
    tokens: int = 0

    def rounded(self) -> dict[str, Any]:
        """Return all of it by name, numbers to six digits, which is enough to choose by."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


@torch.no_grad()
def width_importance(
    model: PreTrainedModel, batches: Iterable[Batch], *, autocast_dtype: torch.dtype | None = None
) -> Importance:
    """Measure units, groups of heads, channels and experts in one forward pass of each batch.

    Args:
        model: a causal LM of a known architecture; its weights and mode are left as they were.
        batches: dicts with `input_ids [B, T]` and, optionally, `attention_mask`; every attended token is measured.

    Raises:
        ConfigurationError: an architecture that is not known, or no token to measure.
    """
    family, shape = family_of(model.config), shape_of(model.config)
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else nullcontext()
    sums = _Sums(family, shape)
    was_training = model.training
    model.eval()
    try:
        with sums.listening(model), autocast:
            for batch in batches:
                inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
                sums.attended = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) > 0
                sums.tokens += int(sums.attended.sum())
                model.base_model(**inputs, use_cache=False)
    finally:
        model.train(was_training)
    if sums.tokens == 0:
        raise ConfigurationError("Importance got no token to measure: no batches. Give it batches with text.")
    return sums.importance()


class _Sums:
    """What hooks add up over batches, in float64 on the CPU."""

    def __init__(self, family: Family, shape: Shape):
        self.family, self.shape = family, shape
        self.attended = torch.empty(0)  # [B, T] of the batch in progress
        self.tokens = 0
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.norms: dict[int, Tensor] = {}  # of the columns that read each layer's units, [F]

    def importance(self) -> Importance:
        units = {layer: self.sums["units", layer].sqrt() * self.norms[layer] for layer in self.norms}
        masses = {layer: value for (kind, layer), value in self.sums.items() if kind == "experts"}
        layers = range(self.shape.num_hidden_layers)
        return Importance(
            units=[units[layer].tolist() for layer in layers] if units else [],
            groups=[self.sums["groups", layer].sqrt().tolist() for layer in layers],
            channels=(self.sums["channels", 0] / self.tokens).tolist(),
            experts=[(masses[i] / masses[i].sum()).tolist() for i in layers] if len(masses) == len(layers) else [],
            tokens=self.tokens,
        )

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        hooks = []
        for name, module in model.named_modules():
            layer, role = place_of(name)
            if role in self.family.norms:
                hooks.append(module.register_forward_hook(self._channels))
            elif layer is not None and role in self._listeners:
                hooks.append(module.register_forward_hook(self._at(layer, self._listeners[role])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def _listeners(self) -> dict[str, Callable[..., None]]:
        family = self.family
        return {family.units_read_by: self._units, family.heads_read_by: self._groups, family.router: self._experts}

    def _at(self, layer: int, add: Callable[..., None]) -> Callable[..., None]:
        return lambda module, args, output: add(layer, module, args[0], output)

    def _add(self, kind: str, layer: int, values: Tensor) -> None:
        values = values.cpu().double()
        self.sums[kind, layer] = self.sums[kind, layer] + values if (kind, layer) in self.sums else values

    def _channels(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._add("channels", 0, output[self.attended].float().abs().sum(0))

    def _units(self, layer: int, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        self._add("units", layer, inputs[self.attended].float().square().sum(0))
        if layer not in self.norms:
            self.norms[layer] = _as_out_in(module, self.family).float().norm(dim=0).cpu().double()

    def _groups(self, layer: int, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        weight_DH, width = _as_out_in(module, self.family), self.shape.group * self.shape.head_dim
        heads_NH = inputs[self.attended].to(weight_DH.dtype)
        parts = zip(heads_NH.split(width, 1), weight_DH.split(width, 1), strict=True)
        self._add("groups", layer, torch.stack([(heads @ w.T).float().square().sum() for heads, w in parts]))

    def _experts(self, layer: int, module: nn.Module, inputs: Tensor, output: Any) -> None:
        _, weights, chosen = output  # [B·T, k] each
        attended = self.attended.flatten()
        masses = torch.zeros(self.shape.num_experts, dtype=torch.float64)
        masses.scatter_add_(0, chosen[attended].flatten().cpu(), weights[attended].flatten().cpu().double())
        self._add("experts", layer, masses)


def _as_out_in(module: Any, family: Family) -> Tensor:
    return module.weight.T if family.output_axis else module.weight


@dataclass(frozen=True)
class Kept:
    """Indices that a student keeps, ascending; None keeps all. Lists by layer where a layer has its own."""

    layers: list[int]
    channels: list[int] | None = None
    units: list[list[int]] | None = None
    groups: list[list[int]] | None = None
    experts: list[list[int]] | None = None

    @property
    def cuts_widths(self) -> bool:
        """Tell whether anything but layers goes."""
        return any(part is not None for part in (self.channels, self.units, self.groups, self.experts))


def most_important(values: Sequence[float], number: int) -> list[int]:
    """Choose the `number` of largest value, ascending; of equals the lower one is kept."""
    return sorted(sorted(range(len(values)), key=lambda index: (-values[index], index))[:number])


def kept_of(importance: Importance, whole: Shape, shape: Shape, layers: Sequence[int]) -> Kept:
    """Choose what a student of this shape keeps of the layers that it keeps."""

    def by_layer(values: list[list[float]], name: str) -> list[list[int]] | None:
        number = getattr(shape, name)
        if number == getattr(whole, name):
            return None
        return [most_important(values[layer], number) for layer in layers]

    narrow = shape.hidden_size != whole.hidden_size
    return Kept(
        layers=list(layers),
        channels=most_important(importance.channels, shape.hidden_size) if narrow else None,
        units=by_layer(importance.units, "intermediate_size"),
        groups=by_layer(importance.groups, "num_key_value_heads"),
        experts=by_layer(importance.experts, "num_experts"),
    )
