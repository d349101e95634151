"""Which shape a student of so many parameters should have: candidates, and what each loses before it is trained.

A candidate is tried in the teacher itself: what it would drop is masked, which gives the student's own logits (norms
without a mean make up for dropped channels by their gains). So no second model is in memory. Shapes: N measured tokens,
D hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..exceptions import ConfigurationError
from .families import Family, family_of, place_of
from .importance import Importance, Kept, kept_of
from .layer_importance import Batch, choose_layers, last_hidden, predicting_positions, summed_forward_kl
from .layers import find_decoder_layers
from .shapes import Shape, Weight, parameters_of, shape_of, step_of, weights_of

TOLERANCE = 0.025  # of the number of parameters that was asked for
_LAYER_CHOICES = 6
_WIDTH_SHARES = (0.75, 0.625)  # of the hidden size, tried where much has to go
_MUCH = 0.6
_NARROWEST = 4  # feed-forward layers are left at least this share of their units: 1 / 4


@dataclass(frozen=True)
class Candidate:
    """A shape, its number of parameters, and what it loses: KL to the teacher before training, in nats per token."""

    shape: Shape
    parameters: int
    kl: float | None = None

    def __str__(self) -> str:
        lost = "" if self.kl is None else f", KL {self.kl:.3f}"
        return f"{self.shape}: {self.parameters:,} parameters{lost}"


def candidates(model: nn.Module, parameters: float) -> list[Candidate]:
    """List shapes of so many parameters: fewer layers, narrower ones, and both.

    Args:
        model: the teacher, or its shell on the meta device.
        parameters: asked for; candidates are within 2.5 % of it, or within half a step of width in tiny models.

    Raises:
        ConfigurationError: an architecture that is not known, a mixture of experts, or no such shape.
    """
    config: Any = model.config
    family, whole = family_of(config), shape_of(config)
    if whole.num_experts:
        raise ConfigurationError(
            f"Got parameters={parameters!r} for a mixture of experts; expected its sizes, because plans are made for "
            "dense models. Set `num_experts`, `keep_layers`, `hidden_size`."
        )
    weights = weights_of(model, family)
    total = parameters_of(weights, whole)
    number = isinstance(parameters, (int, float)) and not isinstance(parameters, bool)
    if not number or not 0 < parameters <= total:
        raise ConfigurationError(
            f"Got parameters={parameters!r}; expected a number up to {total:,}, which the teacher has."
        )
    found: dict[Shape, Candidate] = {}
    for narrow in _narrower(family, whole, parameters / total):
        for layers in _layer_counts(weights, narrow, parameters):
            shape, step = _filled(weights, replace(narrow, num_hidden_layers=layers), parameters)
            count = parameters_of(weights, shape)
            near = abs(count - parameters) <= max(TOLERANCE * parameters, step / 2)
            if near and shape.intermediate_size * _NARROWEST >= whole.intermediate_size:
                found[shape] = Candidate(shape, count)
    if not found:
        raise ConfigurationError(
            f"Got parameters={parameters!r}, and no shape of a {config.model_type} of {total:,} comes near without "
            "feed-forward layers below a quarter of their width. Ask for more, or set sizes yourself (`keep_layers`, "
            "`intermediate_size`, …)."
        )
    return list(found.values())


def _narrower(family: Family, whole: Shape, share: float) -> Iterator[Shape]:
    """The teacher's shape with fewer heads, a narrower residual stream, both and neither."""
    groups = whole.num_key_value_heads
    together = max(1, groups // 8)  # so many devices may share the heads evenly
    fewer = groups if family.width_is_heads else max(1, round(groups * share / together)) * together
    step = step_of(whole.hidden_size)
    widths = [whole.hidden_size]
    if share < _MUCH and not family.centres:
        widths += [round(whole.hidden_size * part / step) * step for part in _WIDTH_SHARES]
    for width in dict.fromkeys(widths):
        for number in dict.fromkeys((groups, fewer)):
            yield replace(
                whole, hidden_size=width, num_key_value_heads=number, num_attention_heads=number * whole.group
            )


def _layer_counts(weights: Sequence[Weight], shape: Shape, parameters: float) -> list[int]:
    """Spread numbers of layers from the fewest that have so many parameters at full width to all of them."""
    most = shape.num_hidden_layers
    counts = [parameters_of(weights, replace(shape, num_hidden_layers=n)) for n in range(1, most + 1)]
    fewest = min(range(most), key=lambda n: abs(counts[n] - parameters)) + 1
    steps = min(_LAYER_CHOICES, most - fewest + 1)
    return sorted({round(fewest + (most - fewest) * i / max(1, steps - 1)) for i in range(steps)})


def _filled(weights: Sequence[Weight], shape: Shape, parameters: float) -> tuple[Shape, int]:
    """The shape with as wide feed-forward layers as there are parameters for, and the parameters of one step of width.

    Their number is affine in that width.
    """
    step, most = step_of(shape.intermediate_size), shape.intermediate_size
    narrowest = parameters_of(weights, replace(shape, intermediate_size=step))
    each = parameters_of(weights, replace(shape, intermediate_size=2 * step)) - narrowest
    width = max(1, 1 + round((parameters - narrowest) / each)) * step
    return replace(shape, intermediate_size=min(width, most)), each


@torch.no_grad()
def measure_candidates(
    model: PreTrainedModel,
    tried: Sequence[Candidate],
    importance: Importance,
    batches: Iterable[Batch],
    *,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[Candidate], None] | None = None,
) -> list[Candidate]:
    """Measure the forward KL of the teacher to each candidate on some text, without training; best first.

    Args:
        importance: of the teacher's layers and widths.
        progress: called with each candidate once it is measured.
    """
    whole = shape_of(model.config)
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else nullcontext()
    was_training, batches, measured = model.training, list(batches), []
    model.eval()
    try:
        with autocast:
            texts = []
            for batch in batches:
                inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
                predicts = predicting_positions(batch).to(device)
                texts.append((inputs, predicts, last_hidden(model, inputs)[predicts]))
            tokens = sum(len(hidden) for _, _, hidden in texts)
            for candidate in tried:
                layers = layers_of(importance, candidate.shape.num_hidden_layers)
                lost = 0.0
                with masked(model, kept_of(importance, whole, candidate.shape, layers)):
                    pruned = [last_hidden(model, inputs)[predicts] for inputs, predicts, _ in texts]
                for (_, _, hidden_ND), pruned_ND in zip(texts, pruned, strict=True):
                    lost += summed_forward_kl(model, hidden_ND, model, pruned_ND)
                measured.append(replace(candidate, kl=lost / tokens))
                if progress is not None:
                    progress(measured[-1])
    finally:
        model.train(was_training)
    return sorted(measured, key=lambda candidate: candidate.kl or 0.0)


def best_of(measured: Sequence[Candidate]) -> Candidate:
    """Choose the candidate that loses least."""
    return min(measured, key=lambda candidate: candidate.kl or 0.0)


def layers_of(importance: Importance, number: int) -> list[int]:
    """Choose the layers to keep: the most important ones; all where nothing is to go."""
    return choose_layers(importance.layers, number)


@contextmanager
def masked(model: PreTrainedModel, kept: Kept) -> Iterator[None]:
    """Let a model answer as a student of these parts would, within it.

    Exact for channels but where norms subtract a mean, and for all else; experts are not masked.
    """
    family, whole = family_of(model.config), shape_of(model.config)
    _, layers = find_decoder_layers(model)
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            if index not in kept.layers:
                stack.enter_context(_passing(layer))
        for name, module in model.named_modules():
            layer_index, role = place_of(name)
            place = kept.layers.index(layer_index) if layer_index in kept.layers else None
            if kept.channels is not None and role in family.writers:
                hide = _masking_output(_mask(whole.hidden_size, kept.channels))
                stack.callback(module.register_forward_hook(hide).remove)
            if place is None:
                continue
            mask = None
            if role == family.units_read_by and kept.units is not None:
                mask = _mask(whole.intermediate_size, kept.units[place])
            if role == family.heads_read_by and kept.groups is not None:
                width = whole.group * whole.head_dim
                mask = _mask(whole.num_key_value_heads, kept.groups[place]).repeat_interleave(width)
            if mask is not None:
                stack.callback(module.register_forward_pre_hook(_masking_input(mask)).remove)
        yield


@contextmanager
def _passing(layer: nn.Module) -> Iterator[None]:
    """A layer that hands on what it gets."""
    before = layer.__dict__.get("forward")  # offloading hooks put a forward of theirs there
    layer.forward = lambda *args, **kwargs: args[0] if args else kwargs["hidden_states"]
    try:
        yield
    finally:
        layer.__dict__.pop("forward", None)
        if before is not None:
            layer.forward = before


def _mask(number: int, kept: Sequence[int]) -> Tensor:
    mask = torch.zeros(number)
    mask[list(kept)] = 1
    return mask


def _masking_output(mask: Tensor) -> Callable[..., Tensor]:
    return lambda module, args, output: output * mask.to(output)


def _masking_input(mask: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    return lambda module, args: (args[0] * mask.to(args[0]), *args[1:])
