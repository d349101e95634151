"""A KV cache whose rows can be dropped and whose layers grow in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 64  # tokens


class GrowingLayer(DynamicLayer):
    """Appends to a buffer with room for more tokens; `DynamicLayer` copies its whole past for each of them."""

    _layer_type = None  # must not take the place of DynamicLayer in transformers' registry

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._key_room: Tensor | None = None
        self._value_room: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, *args: Any) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, H, t, d]` to keys and values; return all of them, as views."""
        self.lazy_initialization(key_states)
        self.keys, self._key_room = _append(self.keys, self._key_room, key_states)
        self.values, self._value_room = _append(self.values, self._value_room, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows only."""
        if self._key_room is not None and self._value_room is not None:
            length = self.get_seq_length()
            self._key_room, self._value_room = self._key_room[indices], self._value_room[indices]
            self.keys, self.values = self._key_room[..., :length, :], self._value_room[..., :length, :]


def _append(past: Tensor | None, room: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
    """All states so far, and the buffer that they are a view of."""
    length = 0 if past is None else past.shape[-2]
    total = length + new.shape[-2]
    if room is None or total > room.shape[-2]:
        batch, heads, _, size = new.shape
        grown = new.new_empty((batch, heads, total + _ROOM, size))
        if length and past is not None:
            grown[..., :length, :] = past
        room = grown
    room[..., length:total, :] = new
    return room[..., :total, :], room


def droppable_cache(config: Any) -> DynamicCache | None:
    """Make an empty cache for this (text) config; None where a layer keeps more than keys and values."""
    try:
        cache = DynamicCache(config=config)
    except (KeyError, TypeError, ValueError, AttributeError):  # layers of a kind that DynamicCache does not know
        return None
    # Sub-classes keep further states (of convolutions, recurrences, indices), which selecting rows would miss.
    if not cache.layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_join(cache: DynamicCache) -> bool:
    """Tell whether `join` works: every layer keeps all its past, none a window of it."""
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def join(caches: list[DynamicCache]) -> DynamicCache:
    """Make one cache with the rows of all, in order; shorter ones get padding on the left, to be masked."""
    whole = caches[0]
    for index in range(len(whole.layers)):
        layers: list[Any] = [cache.layers[index] for cache in caches]  # all `GrowingLayer`
        keys, values = _stack([layer.keys for layer in layers]), _stack([layer.values for layer in layers])
        layers[0].keys, layers[0]._key_room = keys
        layers[0].values, layers[0]._value_room = values
    return whole


def _stack(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`[B_i, H, T_i, d]` states as one tensor, aligned on the right, and the buffer that it is a view of."""
    rows, width = sum(map(len, parts)), max(part.shape[-2] for part in parts)
    _, heads, _, size = parts[0].shape
    room = parts[0].new_zeros((rows, heads, width + _ROOM, size))
    for view, part in zip(room[..., :width, :].split([len(part) for part in parts]), parts, strict=True):
        view[..., width - part.shape[-2] :, :] = part
    return room[..., :width, :], room


def keep_rows(cache: DynamicCache, rows: list[int]) -> None:
    """Drop all other rows of the batch."""
    cache.batch_select_indices(torch.tensor(rows))  # on the host: layers may be on several devices


def close_gaps(cache: DynamicCache, common: int, gaps: Tensor) -> None:
    """Move the first `common` tokens of each row by its gap `[n]` to the right, where the others are."""
    layers: list[Any] = cache.layers  # all `GrowingLayer`
    for layer in layers:
        for states in (layer.keys, layer.values):
            places, gap = torch.arange(states.shape[-2], device=states.device), gaps[:, None].to(states.device)
            sources = torch.where(places < gap + common, (places - gap).clamp(min=0), places)  # [n, T]
            states.copy_(states.gather(2, sources[:, None, :, None].expand_as(states)))
