"""Forwards of the decode loop: prompts, and one token for each row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import models
from ...signals import Head
from .kv_cache import can_join, close_gaps, droppable_cache, join, keep_rows
from .thin_products import linear

if TYPE_CHECKING:
    from .rows import Rows

Run = Callable[[Tensor, Tensor | None, Tensor, Any], tuple[Tensor, ...]]


def parameters_of(causal_lm: Any) -> set[str]:
    """Return names of the arguments that its forward takes."""
    return set(inspect.signature(causal_lm.forward).parameters)


def read_prompts(model: Any, rows: Rows, run: Run, whole: bool = False) -> tuple[list[Tensor], Any]:
    """Return what `run` gives after each prompt, `[n, …]` each, and the cache of all; `whole`: by one forward.

    What all prompts begin with, such as a system prompt, is read once, and so is a prompt that several rows share, as
    those of a group do.
    """

    def empty() -> Any:
        return droppable_cache(causal_lm.config.get_text_config(decoder=True))

    causal_lm = models.causal_lm_of(model)
    apart = can_join(empty()) and not whole
    common = rows.common if apart and _may_be_split(causal_lm) else 0
    start = empty()
    if common:
        head = rows.inputs[:1, rows.prompt_width - rows.lengths[0] :][:, :common]  # the longest row is the first
        run(head, None, torch.arange(common, device=head.device)[None], start)
    outputs, caches = [], []
    for alike, width in rows.alike() if apart else [(slice(None), rows.prompt_width)]:
        columns = slice(rows.prompt_width - width + common, None)
        first, of_each = _once(rows.ids[alike])
        inputs, positions = rows.inputs[alike, columns][first], rows.positions[alike, columns][first]
        mask = None if rows.mask is None else rows.mask[alike, columns][first]
        cache = deepcopy(start)
        if common:
            keep_rows(cache, [0] * len(first))
            # In front of what is left of a shorter prompt are the last tokens of its beginning, which are read already.
            mask = torch.ones_like(inputs) if mask is None else mask * (positions >= common)
            mask = torch.cat([mask.new_ones(len(mask), common), mask], dim=1)
        missing = None if mask is None or bool(mask.all()) else width - mask.sum(dim=1)
        told = run(inputs, None if missing is None else mask, positions, cache)
        outputs.append([values[of_each] for values in told])
        if common and missing is not None:
            close_gaps(cache, common, missing)
        if len(first) < len(of_each):
            keep_rows(cache, of_each)
        caches.append(cache)
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)], caches[0] if len(caches) == 1 else join(caches)


def _may_be_split(causal_lm: Any) -> bool:
    """Whether a prompt may be read in two parts with padding between them, which only positions tell apart.

    Not where a layer looks back over a number of places, whatever is in them (GPT-Neo), nor where rotary frequencies
    follow from the length of what is read at once.
    """
    config = causal_lm.config.get_text_config(decoder=True)
    rotary = getattr(config, "rope_parameters", None) or {}
    of_layers = [rotary, *(part for part in rotary.values() if isinstance(part, dict))]
    by_length = any(part.get("rope_type") in ("dynamic", "longrope") for part in of_layers)
    local = getattr(config, "attention_layers", None)
    return "position_ids" in parameters_of(causal_lm) and not local and not by_length


def _once(ids: Tensor) -> tuple[list[int], list[int]]:
    """The rows of `[n, P]` without repetitions, and for each row its place among them."""
    places: dict[tuple[int, ...], int] = {}
    of_each = [places.setdefault(tuple(row), len(places)) for row in ids.tolist()]
    return [of_each.index(place) for place in places.values()], of_each


def runner(model: Any, exact: bool = False) -> Run:
    """Make `run(ids, mask, positions, cache)`: the logits `[n, V]` of the last position alone, at least float32.

    `exact`: with the head's product in float32, as losses take it, where the model itself would round its logits to
    bfloat16: a ratio of the student to itself is then 1 but for what rounding does to its hidden states.
    """
    accepted = parameters_of(models.causal_lm_of(model))
    exact = exact and models.gives_hidden_states(model)

    def run(ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> tuple[Tensor]:
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in accepted}
        if exact:
            options = {**options, "on_hidden": lambda hidden, head: wide_logits(hidden[:, -1], head)}
            options.pop("logits_to_keep", None)
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        logits = output if exact else output.logits[:, -1]
        return (logits.to(device=ids.device, dtype=torch.promote_types(logits.dtype, torch.float32)),)

    return run


def wide_logits(hidden: Tensor, head: Head) -> Tensor:
    """Turn `[n, D]` hidden states into `[n, V]` logits, at least float32 under autocast too."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head.finish(linear(*head.operands(hidden)))
