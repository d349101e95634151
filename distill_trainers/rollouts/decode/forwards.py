"""Forwards of the decode loop: prompts, and one token for each row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import models
from ...signals import Head
from .kv_cache import can_join, droppable_cache, join, keep_rows
from .thin_products import linear

if TYPE_CHECKING:
    from .rows import Rows

Run = Callable[[Tensor, Tensor | None, Tensor, Any], Tensor]


def parameters_of(causal_lm: Any) -> set[str]:
    """Return names of the arguments that its forward takes."""
    return set(inspect.signature(causal_lm.forward).parameters)


def read_prompts(model: Any, rows: Rows, run: Run, whole: bool = False) -> tuple[Tensor, Any]:
    """Return what `run` gives after each prompt, `[n, …]`, and the cache of all; `whole`: by one forward.

    A prompt that several rows share, as those of a group do, is read once.
    """

    def empty() -> Any:
        return droppable_cache(models.causal_lm_of(model).config.get_text_config(decoder=True))

    parts = rows.alike() if can_join(empty()) and not whole else [(slice(None), slice(None))]
    outputs, caches = [], []
    for alike, positions in parts:
        first, of_each = _once(rows.ids[alike, positions])
        mask = None if rows.mask is None else rows.mask[alike, positions][first]
        mask = None if mask is None or bool(mask.all()) else mask
        caches.append(empty())
        inputs, at = rows.inputs[alike, positions][first], rows.positions[alike, positions][first]
        output = run(inputs, mask, at, caches[-1])
        if len(first) < len(of_each):
            keep_rows(caches[-1], of_each)
            output = output[of_each]
        outputs.append(output)
    return torch.cat(outputs), caches[0] if len(caches) == 1 else join(caches)


def _once(ids: Tensor) -> tuple[list[int], list[int]]:
    """The rows of `[n, P]` without repetitions, and for each row its place among them."""
    places: dict[tuple[int, ...], int] = {}
    of_each = [places.setdefault(tuple(row), len(places)) for row in ids.tolist()]
    return [of_each.index(place) for place in places.values()], of_each


def runner(model: Any, exact: bool = False) -> Run:
    """Make `run(ids, mask, positions, cache)`: logits `[n, V]` of the last position, at least float32.

    `exact`: with the head's product in float32, as losses take it, where the model itself would round its logits to
    bfloat16: a ratio of the student to itself is then 1 but for what rounding does to its hidden states.
    """
    accepted = parameters_of(models.causal_lm_of(model))
    exact = exact and models.gives_hidden_states(model)

    def run(ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in accepted}
        if exact:
            options = {**options, "on_hidden": lambda hidden, head: wide_logits(hidden[:, -1], head)}
            options.pop("logits_to_keep", None)
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        logits = output if exact else output.logits[:, -1]
        return logits.to(device=ids.device, dtype=torch.promote_types(logits.dtype, torch.float32))

    return run


def wide_logits(hidden: Tensor, head: Head) -> Tensor:
    """Turn `[n, D]` hidden states into `[n, V]` logits, at least float32 under autocast too."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head.finish(linear(*head.operands(hidden)))
