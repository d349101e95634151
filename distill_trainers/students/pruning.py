"""Prune a teacher in every direction: layers, feed-forward units, heads, hidden channels, experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..exceptions import ConfigurationError
from .cutting import cut_widths
from .importance import Importance, Kept, kept_of, width_importance
from .layer_importance import Batch, Progress, layer_importance
from .layers import check_config_describes, find_decoder_layers, kept_layers, prune_layers, refuse_unprunable
from .planning import Candidate, best_of, candidates, layers_of, measure_candidates
from .shapes import Shape, asked_shape, shape_of

CHOICE_NAME = "pruning.json"
SIZES = ("intermediate_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_experts")


def prune(
    model: PreTrainedModel,
    *,
    keep_layers: int | Sequence[int] | None = None,
    intermediate_size: int | None = None,
    hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    num_experts: int | None = None,
    parameters: float | None = None,
    batches: Iterable[Batch] | None = None,
    copy: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Make a smaller model of the same architecture out of the parts of a teacher that matter most.

    Args:
        model: a causal LM: Llama, Mistral, Mixtral, Qwen2, Qwen3 (mixtures too), Gemma 1 to 3, GPT-2, Phi, Phi-3.
            Others can lose layers alone.
        keep_layers: how many layers, or which, ascending. A number takes the most important ones; evenly spaced ones
            where there is nothing to measure on.
        intermediate_size: units of each feed-forward layer, a multiple of 8.
        hidden_size: channels of the residual stream, a multiple of 8.
        num_attention_heads, num_key_value_heads: heads of each layer, in whole groups that share a key-value head; one
            of both says the other. `head_dim` stays.
        num_experts: experts of each mixture.
        parameters: in place of all sizes: make a plan, the shape of about so many parameters that loses least.
        batches: dicts with `input_ids [B, T]` and, optionally, `attention_mask` and unshifted `labels`, to measure on.
        copy: leave `model` as it is; False takes its weights, tensor by tensor, and leaves it empty where widths are
            cut.
        options: for `choose`.

    Returns:
        An ordinary model, trainable throughout.

    Raises:
        ConfigurationError: sizes that cannot be, or contradict each other; an architecture that is not known; a
            quantised, adapted or sharded model; nothing to measure on.
    """
    sizes = {
        "intermediate_size": intermediate_size,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_experts": num_experts,
    }
    choice = choose(model, keep_layers=keep_layers, sizes=sizes, parameters=parameters, batches=batches, **options)
    return take(model, choice, copy=copy)


@dataclass(frozen=True)
class Choice:
    """What a student keeps of its teacher, and why.

    Args:
        shape: the student's; None where layers alone were chosen.
        importance: what was measured; None where nothing was.
        candidates: of a plan, best first.
    """

    kept: Kept
    shape: Shape | None = None
    importance: Importance | None = None
    candidates: list[Candidate] = field(default_factory=list)

    def to_json(self) -> str:
        """Write all of it as JSON, measured numbers to six digits."""
        told: dict[str, Any] = {"shape": self.shape and asdict(self.shape), "kept": asdict(self.kept)}
        told["candidates"] = [asdict(candidate) for candidate in self.candidates]
        told["importance"] = self.importance and self.importance.rounded()
        return json.dumps(told)


def choose(
    model: PreTrainedModel,
    *,
    keep_layers: int | Sequence[int] | None = None,
    sizes: Mapping[str, int | None] | None = None,
    parameters: float | None = None,
    batches: Iterable[Batch] | None = None,
    importance: Importance | None = None,
    measure: str = "kl",
    autocast_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    told: Callable[[Candidate], None] | None = None,
) -> Choice:
    """Choose what `take` keeps of a teacher; see `prune`.

    Args:
        sizes: by the names of `prune`.
        importance: measured before; then `batches` are needed by `parameters` alone: candidates are tried on text.
        measure: of layers, see `layer_importance`.
        progress: of the measure of layers; `told` is called with each candidate of a plan once it is measured.
    """
    refuse_unprunable(model)
    sizes = dict(sizes or {})
    check_sizes(keep_layers, sizes, parameters)
    total = len(find_decoder_layers(model)[1])
    layers = None if keep_layers is None else kept_layers(total, keep_layers)  # even ones, unless others matter more
    planned = [] if parameters is None else candidates(model, parameters)
    narrow = any(size is not None for size in sizes.values())
    shape = asked_shape(model.config, sizes) if narrow else None
    cuts = bool(planned) or (shape is not None and shape != shape_of(model.config))
    texts = None if batches is None else list(batches)
    if texts is None and (planned or (cuts and importance is None)):
        raise ConfigurationError(
            "Got sizes to prune to and no text to measure what matters; expected `batches`: a few dicts with "
            "`input_ids`, such as training data."
        )
    counted = isinstance(keep_layers, int) and keep_layers < total
    if texts is not None and (cuts or counted):
        ranks = bool(planned) or counted
        importance = _measured(model, texts, importance, cuts, measure if ranks else None, autocast_dtype, progress)
    if planned:
        assert importance is not None and texts is not None
        planned = measure_candidates(model, planned, importance, texts, autocast_dtype=autocast_dtype, progress=told)
        shape = best_of(planned).shape
        layers = layers_of(importance, shape.num_hidden_layers)
    elif counted and importance is not None and importance.layers:
        layers = layers_of(importance, keep_layers)  # type: ignore[arg-type]  # a number
    layers = list(range(total)) if layers is None else layers
    kept = Kept(layers)
    if shape is not None:
        shape = replace(shape, num_hidden_layers=len(layers))
    if cuts:
        assert importance is not None and shape is not None
        kept = kept_of(importance, shape_of(model.config), shape, layers)
    return Choice(kept, shape, importance, planned)


def _measured(
    model: PreTrainedModel,
    texts: list[Batch],
    known: Importance | None,
    widths: bool,
    measure: str | None,
    autocast_dtype: torch.dtype | None,
    progress: Progress | None,
) -> Importance:
    """What is known, and the rest of what is needed: widths, and layers by this measure."""
    found = known or (width_importance(model, texts, autocast_dtype=autocast_dtype) if widths else Importance())
    if measure is None or found.layers:
        return found
    layers = layer_importance(model, texts, measure=measure, autocast_dtype=autocast_dtype, progress=progress)
    return replace(found, layers=layers)


def take(model: PreTrainedModel, choice: Choice, *, copy: bool = True) -> PreTrainedModel:
    """Make the student of a choice.

    Args:
        copy: leave `model` as it is; False takes its weights, so that memory holds little more than the model.
    """
    whole = len(choice.kept.layers) == len(find_decoder_layers(model)[1])
    cuts = choice.kept.cuts_widths
    student = model if whole and cuts else prune_layers(model, choice.kept.layers, copy=copy)
    if cuts:
        assert choice.shape is not None
        student = cut_widths(student, choice.kept, choice.shape, copy=copy and whole)
        check_config_describes(student)
    return student.requires_grad_(True)


def check_sizes(keep_layers: Any, sizes: Mapping[str, Any], parameters: Any) -> None:
    """Refuse sizes that contradict each other, without a model.

    Raises:
        ConfigurationError: sizes beside a number of parameters.
    """
    named = [name for name, value in {"keep_layers": keep_layers, **sizes}.items() if value is not None]
    if parameters is not None and named:
        raise ConfigurationError(
            f"Got parameters={parameters!r} beside {', '.join(named)}; expected one or the other: a number of "
            "parameters makes a plan of all sizes. Keep one."
        )
