"""Cut a model's weights to what a student keeps, one tensor at a time.

Shapes: D hidden channels of the model, D' of the student.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..losses.reduction import widest
from .families import EXPERTS, FUSED_HEADS, GATED_UNITS, GROUPS, HEADS, HIDDEN, UNITS, Family, family_of
from .importance import Kept
from .shapes import Shape, shape_of, write_shape


def cut_widths(model: PreTrainedModel, kept: Kept, shape: Shape, *, copy: bool = True) -> PreTrainedModel:
    """Make a narrower model of the same architecture and the same layers.

    Where channels go, the gains of norms are multiplied by sqrt(D / D'): dropped channels that were 0 then change no
    logit, as a mean of squares is over fewer channels.

    Args:
        kept: its lists are by the layers of `model`.
        copy: leave `model` as it is; False takes each weight out of it as it is cut, so that both are never in memory,
            and leaves `model` empty.
    """
    family, whole = family_of(model.config), shape_of(model.config)
    config = deepcopy(model.config)
    write_shape(config, shape)
    with init_empty_weights(include_buffers=False):  # buffers, such as rotary frequencies, are made and not copied
        student = type(model)(config)
    indices = _Indices(whole, kept)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, *others in [names.pop(parameter) for parameter in list(names)]:  # tied ones are cut once
        parameter = model.get_parameter(name)
        layer, role, axes = family.axes_of(name, parameter.dim())
        value = parameter.detach()
        for dim, axis in enumerate(axes):
            index = indices.of(axis, layer)
            if index is not None:
                value = value.index_select(dim, index.to(value.device))
        factor = _factor(role, name, family, whole, shape, tied=config.tie_word_embeddings)
        if factor != 1.0:
            offset = family.gain_offset if role in family.norms else 0.0
            value = ((widest(value) + offset) * factor - offset).to(value.dtype)
        if copy and value.data_ptr() == parameter.data_ptr():
            value = value.clone()
        _put(student, name, value)
        if not copy:
            for taken in (name, *others):
                _put(model, taken, torch.empty(0))
    student.tie_weights()
    devices = {parameter.device for parameter in student.parameters()}
    if len(devices) == 1:  # parts of a model on several devices stay there; a run loads the student anew
        student.to(devices.pop())  # type: ignore[arg-type]  # its buffers
    student.generation_config = deepcopy(model.generation_config)
    return student.train(model.training)


def _factor(role: str, name: str, family: Family, whole: Shape, shape: Shape, *, tied: bool) -> float:
    """What a weight over channels is multiplied by so that fewer of them give the same."""
    gain = math.sqrt(whole.hidden_size / shape.hidden_size)
    if not family.scales_embedding:
        return gain if role in family.norms and not name.endswith(".bias") else 1.0
    # The embedding is multiplied by the root of a width that is smaller now. A head that is the embedding becomes
    # larger with it, so the last norm makes up for that.
    if role == "embed_tokens":
        return gain
    return gain if role in family.norms and not (tied and role == "norm") else 1.0


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value))


class _Indices:
    """Positions along an axis that are kept; None where all are."""

    def __init__(self, whole: Shape, kept: Kept):
        self.whole, self.kept = whole, kept

    def of(self, axis: str, layer: int | None) -> Tensor | None:
        """Return what is kept of an axis of a weight in this layer."""
        kept, whole = self.kept, self.whole
        if axis == HIDDEN:
            return _tensor(kept.channels)
        if layer is None:
            return None
        if axis in (UNITS, GATED_UNITS):
            units = _tensor(kept.units and kept.units[layer])
            if units is None or axis == UNITS:
                return units
            return torch.cat([units, units + whole.intermediate_size])
        if axis == EXPERTS:
            return _tensor(kept.experts and kept.experts[layer])
        groups = _tensor(kept.groups and kept.groups[layer])
        if groups is None or axis not in (HEADS, GROUPS, FUSED_HEADS):
            return None
        queries, keys = _blocks(groups, whole.group * whole.head_dim), _blocks(groups, whole.head_dim)
        if axis == FUSED_HEADS:
            start = whole.num_attention_heads * whole.head_dim
            return torch.cat([queries, start + keys, start + whole.num_key_value_heads * whole.head_dim + keys])
        return queries if axis == HEADS else keys


def _blocks(chosen: Tensor, width: int) -> Tensor:
    return (chosen[:, None] * width + torch.arange(width)).flatten()


def _tensor(indices: Any) -> Tensor | None:
    return None if indices is None else torch.tensor(indices, dtype=torch.long)
