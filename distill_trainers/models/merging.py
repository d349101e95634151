"""Adapters merged into their base, and the proof that a model which was merged or saved answers as before.

Shapes: B rows, T tokens, V ids.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..exceptions import ConfigurationError, UnlikeModelError
from .adapters import causal_lm_of
from .forward import without_token_forward
from .loading import load_causal_lm
from .probing import logits_of, probe
from .whole import first_words, load_whole_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_LEAST_ROUNDING = 1e-4  # other devices multiply in another order


def refuse_unmergeable(model: nn.Module) -> None:
    """Refuse adapters that PEFT cannot merge, or would leave half merged.

    Raises:
        ConfigurationError: which layer it is, and why.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        base = layer._modules.get("base_layer")
        reason = None
        if isinstance(base, AuxiliaryTrainingWrapper):
            reason = (
                "carries an adapter and trained tokens (`trainable_token_indices`) at once, and PEFT merges one alone"
            )
        elif any(getattr(layer, "lora_bias", {}).values()) and getattr(base, "bias", None) is None:
            reason = "has no bias that `lora_bias` could be merged into"
        if reason is not None:
            raise ConfigurationError(
                f"The adapter cannot be merged: {name.removeprefix('base_model.model.')} {reason}. Leave that setting "
                "out, take the layer out of the adapter's target modules, or use the adapter unmerged."
            )


def merge(model: Any, adapter: str = "the adapter", remedy: str = "") -> PreTrainedModel:
    """Merge the active adapter of a whole PeftModel into its base, which is changed, and return it.

    Where head and embedding share a weight that the adapter changes for one of the two, each gets its own first, and
    the config says so: merged into the shared one, the change of the head would be one of the embedding, too.

    Args:
        adapter, remedy: for the message of an error.

    Raises:
        ConfigurationError: PEFT cannot merge this adapter.
        UnlikeModelError: the merged model does not answer as the adapted one.
    """
    refuse_unmergeable(model)
    inputs = probe(causal_lm_of(model))
    expected = _logits_if_it_runs(model, inputs, adapter)
    causal_lm: Any = causal_lm_of(model)
    was_tied = _untie(causal_lm)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # done above
            merged = without_token_forward(model.merge_and_unload())
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigurationError(f"PEFT cannot merge {adapter} into its base: {reason}. {remedy}".strip()) from error
    if was_tied:
        _tie_again(merged)
    if expected is not None:
        check_alike(logits_of(merged, inputs), expected, merged.dtype, f"{adapter}, merged into its base,", remedy)
    return merged


def _logits_if_it_runs(model: Any, inputs: Mapping[str, Tensor], adapter: str) -> Tensor | None:
    """Return `logits_of`; None, with a warning, where the model cannot run where it is."""
    try:
        return logits_of(model, inputs)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        # A copy on the CPU has kernels for GPUs alone where Liger has replaced the RoPE of the whole architecture.
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        logger.warning(
            "%s is merged, but not compared before and after: the model does not run here: %s.", adapter, reason
        )
        return None


def _weight_owner(module: Any) -> Any:
    """The innermost module of adapters around a layer."""
    while isinstance(inner := _base_layer(module), nn.Module):
        module = inner
    return module


def _base_layer(module: Any) -> Any:
    if "token_adapter" in module._modules:
        module = module.token_adapter
    return module._modules.get("base_layer", module._modules.get("original_module"))


def _untie(causal_lm: PreTrainedModel) -> bool:
    """Give the head a weight of its own where it shares one that an adapter changes; tell whether they were tied."""
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if embedding is None or head is None:
        return False
    inner, outer = _weight_owner(embedding), _weight_owner(head)
    if getattr(inner, "weight", None) is not getattr(outer, "weight", 0):
        return False
    if inner is not embedding or outer is not head:
        outer.weight = nn.Parameter(outer.weight.detach().clone(), requires_grad=outer.weight.requires_grad)
    return True


def _tie_again(causal_lm: PreTrainedModel) -> None:
    """Share one weight where the merged head and embedding are still equal; else say in the config that they differ."""
    embedding: Any = causal_lm.get_input_embeddings()
    head: Any = causal_lm.get_output_embeddings()
    tied = embedding.weight is head.weight or torch.equal(embedding.weight, head.weight)
    if tied:
        head.weight = embedding.weight
    for config in {id(c): c for c in (causal_lm.config, causal_lm.config.get_text_config())}.values():
        config.tie_word_embeddings = tied
    causal_lm.all_tied_weights_keys = causal_lm.get_expanded_tied_weights_keys(all_submodels=True)


def merged_copy(model: Any) -> PreTrainedModel:
    """Copy the causal LM of a whole PeftModel to the CPU, adapter merged; the model itself stays as it is.

    Merging into the model and out of it again would round its weights.

    Raises:
        ConfigurationError, UnlikeModelError: see `merge`.
    """
    # What is shared stays shared: a copy finds a tensor's stand-in by the tensor.
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        moved = nn.Parameter(parameter.detach().to("cpu", copy=True), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = moved
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    for module in model.modules():
        # What PEFT remembers of tied adapters are tensors of a graph, which cannot be copied; nothing reads them again.
        remembered = getattr(module, "kwargs", {}).get("tied_adapter") or {}
        memo |= {id(tensor): tensor.detach() for tensor in remembered.values()}
    remedy = "The adapter itself is saved, and can be used unmerged; without `merge_adapter` nothing is merged."
    return merge(without_token_forward(copy.deepcopy(model, memo)), "The student's adapter", remedy)


def load_merged_adapter(name: str, *, role: str = "student", **init_kwargs: Any) -> Any:
    """Load the base model of a folder that holds a PEFT adapter alone, with the adapter merged into it.

    Raises:
        ConfigurationError, UnlikeModelError: see `merge`.
    """
    model = load_adapted(name, role=role, **init_kwargs)
    remedy = "Load it in Python with PEFT, unmerged, and pass the model."
    return merge(model, f"The adapter in {str(name)!r}", remedy)


def load_adapted(name: str, *, role: str = "student", **init_kwargs: Any) -> Any:
    """Load the base model of a folder that holds a PEFT adapter alone, with the adapter on it, unmerged.

    Raises:
        ConfigurationError: the folder does not name the base; base or adapter are damaged, or not whole.
    """
    from peft import PeftModel

    what = f"The adapter of the {role} in {str(name)!r}"
    try:
        told = json.loads((Path(os.path.expanduser(name)) / "adapter_config.json").read_text(encoding="utf-8"))
        base = told["base_model_name_or_path"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{what} names no base model: its `adapter_config.json` is damaged. Fetch it again."
        ) from error
    if not isinstance(base, str):
        raise ConfigurationError(f"{what} names the base model {base!r}; expected a folder or Hub id. Write it there.")
    model = load_causal_lm(base, role=role, **init_kwargs)
    try:
        peft = PeftModel.from_pretrained(model, name)
        load_whole_adapter(peft, name, "default", what)  # once more: the line above drops what it is told
    except ConfigurationError:
        raise
    except Exception as error:  # damaged files fail in many ways
        raise ConfigurationError(
            f"{what} cannot be loaded: {first_words(error)}. Expected an adapter of {base!r}: fetch it again, or name "
            "the base that it was trained on."
        ) from error
    return peft


# ---- The proof ------------------------------------------------------------------------------------------------------


def logits_gap(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square difference of logits `[tokens, V]`, as a share of their spread over the vocabulary.

    What shifts all logits of a token changes no probability, and does not count. Ids of either that are masked (-inf)
    count where the other is not.
    """
    if found.shape != expected.shape:
        return float("inf")
    found, expected = (logits.double().clamp(min=-1e4) for logits in (found, expected))
    found, expected = (logits - logits.mean(-1, keepdim=True) for logits in (found, expected))
    gap = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return gap if gap == gap else float("inf")


def largest_gap(dtype: torch.dtype) -> float:
    """Return how far logits may differ by rounding alone: ten times that of the dtype, and no less than 1e-4."""
    return max(10 * torch.finfo(dtype).eps, _LEAST_ROUNDING)


def check_alike(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str, remedy: str) -> float:
    """Compare logits; return their `logits_gap`.

    Raises:
        UnlikeModelError: they differ by more than `largest_gap` of the dtype.
    """
    gap, most = logits_gap(found, expected), largest_gap(dtype)
    if gap <= most:
        return gap
    raise UnlikeModelError(
        f"{what} does not answer as what was trained: on {len(expected)} tokens its logits differ by {gap:.2g} of "
        f"their spread (root mean square), expected at most {most:.2g}, which is rounding in "
        f"{str(dtype).removeprefix('torch.')}. {remedy}".strip()
    )
