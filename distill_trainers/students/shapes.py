"""The shape of a student: how many layers, and how wide each part of them; what may be asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..exceptions import ConfigurationError
from .families import EXPERTS, FUSED_HEADS, GATED_UNITS, GROUPS, HEADS, HIDDEN, UNITS, Family, family_of

# Rows of a matrix are multiplied in tiles: a width that is no multiple of this leaves fast kernels unused.
MULTIPLE = 8
Weight = tuple[int | None, tuple[str, ...], tuple[int, ...]]
_FINE = 64  # what plans round widths to, where a model is wide enough


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; `num_experts` is 0 where there is no mixture, `intermediate_size` where there is one."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    head_dim: int

    def __str__(self) -> str:
        inner = f"{self.num_experts} experts" if self.num_experts else f"FFN {self.intermediate_size}"
        heads = f"{self.num_attention_heads}/{self.num_key_value_heads} heads"
        return f"{self.num_hidden_layers} layers, width {self.hidden_size}, {inner}, {heads}"

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def size_of(self, axis: str) -> int | None:
        """Return the length of such an axis; None for one that is kept whole."""
        heads, groups = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            HIDDEN: self.hidden_size,
            UNITS: self.intermediate_size,
            GATED_UNITS: 2 * self.intermediate_size,
            HEADS: heads,
            GROUPS: groups,
            FUSED_HEADS: heads + 2 * groups,
            EXPERTS: self.num_experts,
        }.get(axis)


def shape_of(config: Any) -> Shape:
    """Read the shape of a model of a known architecture from its config."""
    family = family_of(config)
    heads, width = config.num_attention_heads, config.hidden_size
    inner = getattr(config, family.names.get("intermediate_size", "intermediate_size"), None) or 4 * width
    return Shape(
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=width,
        intermediate_size=0 if family.router else inner,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        num_experts=getattr(config, family.names.get("num_experts", "num_experts")) if family.router else 0,
        head_dim=getattr(config, "head_dim", None) or width // heads,
    )


def write_shape(config: Any, shape: Shape) -> None:
    """Put widths and heads into a config, in place; its layers stay as they are."""
    family = family_of(config)
    config.hidden_size, config.num_attention_heads = shape.hidden_size, shape.num_attention_heads
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = shape.num_key_value_heads
    if not family.width_is_heads:
        config.head_dim = shape.head_dim  # else it would be read off the width, and rotary positions with it
    if family.router:
        setattr(config, family.names.get("num_experts", "num_experts"), shape.num_experts)
    else:
        setattr(config, family.names.get("intermediate_size", "intermediate_size"), shape.intermediate_size)


def asked_shape(config: Any, widths: Mapping[str, int | None]) -> Shape:
    """Return the shape of a model of this config with some widths asked for; None keeps one.

    Raises:
        ConfigurationError: an architecture that is not known, or a width that the model cannot have.
    """
    family, whole = family_of(config), shape_of(config)
    asked = {name: value for name, value in widths.items() if value is not None}
    for name, value in asked.items():
        _check_width(name, value, whole, family)
    heads, groups = asked.get("num_attention_heads"), asked.get("num_key_value_heads")
    if groups is None and heads is not None:
        _refuse_unless(
            heads % whole.group == 0, "num_attention_heads", heads, f"a multiple of {whole.group}, {_groups(whole)}"
        )
        asked["num_key_value_heads"] = heads // whole.group
    elif heads is None and groups is not None:
        asked["num_attention_heads"] = groups * whole.group
    elif heads is not None and groups is not None:
        fits = heads == groups * whole.group
        _refuse_unless(fits, "num_attention_heads", heads, f"{groups * whole.group}, {_groups(whole)}")
    shape = replace(whole, **asked)
    if family.width_is_heads and shape.hidden_size != shape.num_attention_heads * whole.head_dim:
        raise ConfigurationError(
            f"Got hidden_size={shape.hidden_size} with {shape.num_attention_heads} heads of {whole.head_dim}; expected "
            f"heads × {whole.head_dim}, because the width of a {config.model_type} is that of its heads. Set "
            "`hidden_size` and `num_attention_heads` together."
        )
    _check_rest(config, shape)
    return shape


def _check_width(name: str, value: Any, whole: Shape, family: Family) -> None:
    largest = getattr(whole, name)
    number = isinstance(value, int) and not isinstance(value, bool)
    if name == "intermediate_size" and family.router:
        raise ConfigurationError(
            f"Got intermediate_size={value} for a mixture of experts; expected `num_experts`, because experts are kept "
            "or dropped whole."
        )
    if name == "num_experts" and not family.router:
        raise ConfigurationError(f"Got num_experts={value}, but the model has none. Leave it out.")
    _refuse_unless(number and 1 <= value <= largest, name, value, f"1 to {largest}, which the teacher has")
    if name in ("intermediate_size", "hidden_size") and value != largest:
        _refuse_unless(value % MULTIPLE == 0, name, value, f"a multiple of {MULTIPLE}, such as {_nearest(value)}")


def _check_rest(config: Any, shape: Shape) -> None:
    chosen = getattr(config, "num_experts_per_tok", 0) if shape.num_experts else 0
    enough = not chosen or shape.num_experts >= chosen
    _refuse_unless(enough, "num_experts", shape.num_experts, f"{chosen} or more, as a token has so many")
    if getattr(config, "qk_layernorm", False) and shape.hidden_size // shape.num_attention_heads != shape.head_dim:
        raise ConfigurationError(
            f"Got hidden_size={shape.hidden_size} with {shape.num_attention_heads} heads; expected heads × "
            f"{shape.head_dim}, because the norms of this model's queries have that width. Set both together."
        )


def _groups(whole: Shape) -> str:
    return f"because {whole.group} query heads share one key-value head, and such groups are kept whole"


def _nearest(value: int) -> int:
    return max(MULTIPLE, round(value / MULTIPLE) * MULTIPLE)


def _refuse_unless(fits: bool, name: str, value: Any, expected: str) -> None:
    if not fits:
        raise ConfigurationError(
            f"Got {name}={value!r}; expected {expected}. Change `{name}`, or leave it out to keep all."
        )


def weights_of(model: nn.Module, family: Family) -> list[Weight]:
    """List layer, axes and lengths of a model's weights, perhaps on the meta device."""
    found = []
    for name, parameter in model.named_parameters():
        layer, _, axes = family.axes_of(name, parameter.dim())
        found.append((layer, axes, tuple(parameter.shape)))
    return found


def parameters_of(weights: Sequence[Weight], shape: Shape) -> int:
    """Count the parameters that a model of these weights would have in another shape."""
    sizes = {axis: shape.size_of(axis) for axis in {axis for _, axes, _ in weights for axis in axes}}
    return sum(
        math.prod(sizes[axis] or length for axis, length in zip(axes, lengths, strict=True))
        for layer, axes, lengths in weights
        if layer is None or layer < shape.num_hidden_layers
    )


def step_of(width: int) -> int:
    """Return what a plan rounds this width to: 64 where a model is wide enough for many choices, and at least 8."""
    step = _FINE
    while step > MULTIPLE and step > width // 32:
        step //= 2
    return step
