"""Make a student out of its teacher by keeping some of its decoder layers.

A student that starts from the teacher's own layers needs far less training than one that starts from nothing
(DistilBERT, arXiv 1910.01108, section 3; Minitron, arXiv 2407.14679). Which layers: evenly spaced ones, or the ones
that matter most on a few batches of text. Shapes: B rows, T tokens, N measured tokens, D hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..exceptions import ConfigurationError
from ..models import is_peft

_KEPT_LAYERS, _KEPT_OF = "kept_layers", "kept_layers_of"  # of the config: which of how many layers are left


def prune_layers(model: PreTrainedModel, keep: int | Sequence[int], *, copy: bool = True) -> PreTrainedModel:
    """Make a model of the same architecture with only some of the decoder layers.

    Args:
        model: a causal LM whose decoder layers are one `ModuleList` (Llama, Qwen, GPT-2, GPT-NeoX, ...).
        keep: how many layers to keep, evenly spaced with the first and the last among them; or which, ascending.
        copy: leave `model` as it is and return new weights; False prunes `model` itself.

    Returns:
        An ordinary model, trainable throughout: config and layer numbers are its own, tied weights stay tied.

    Raises:
        ConfigurationError: layers that do not exist; a quantised, adapted or sharded model; an architecture whose
            layers cannot be found, or cannot be described by its config after pruning.
    """
    refuse_unprunable(model)
    path, layers = find_decoder_layers(model)
    indices = kept_layers(len(layers), keep)

    model.set_submodule(path, nn.ModuleList(layers[index] for index in indices))
    student = model
    if copy:
        try:
            student = deepcopy(model)  # while the dropped layers are out of it: they are never copied
        finally:
            model.set_submodule(path, layers)
    _renumber(cast(nn.ModuleList, student.get_submodule(path)))
    _shrink_config(student.config.get_text_config(decoder=True), indices, len(layers))
    check_config_describes(student)
    return student.requires_grad_(True)


def kept_layers(total: int, keep: int | Sequence[int]) -> list[int]:
    """Choose which of `total` layers `prune_layers` keeps.

    Raises:
        ConfigurationError: layers that do not exist, or are named twice or out of order.
    """
    return even_layers(total, keep) if isinstance(keep, int) else _checked_layers(keep, total)


def even_layers(total: int, keep: int) -> list[int]:
    """Choose `keep` of `total` layers, evenly spaced, first and last among them (the first alone if 1)."""
    check_count(total, keep)
    if keep == 1:
        return [0]
    gaps = keep - 1
    return [(2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(keep)]  # rounds half up


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers and where they are: the outermost `ModuleList` with `num_hidden_layers` items."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        # Experts or heads inside a layer may happen to be as many as the layers.
        inside_another = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside_another:
            lists[name] = module
    if len(lists) != 1:
        raise ConfigurationError(
            f"{type(model).__name__} has {len(lists)} lists of {count} modules ({', '.join(lists) or 'none'}); "
            "expected one, the decoder layers. Layers of this architecture cannot be chosen; use a ready-made student."
        )
    return next(iter(lists.items()))


def check_count(total: int, keep: int) -> None:
    if isinstance(keep, bool) or not 1 <= keep <= total:
        raise ConfigurationError(f"Asked to keep {keep!r} of {total} layers; expected 1 to {total}.")


def _checked_layers(keep: Sequence[int], total: int) -> list[int]:
    indices = list(keep)
    ascending = all(isinstance(index, int) for index in indices) and indices == sorted(set(indices))
    if not indices or not ascending or indices[0] < 0 or indices[-1] >= total:
        raise ConfigurationError(
            f"Asked to keep the layers {indices}; expected different numbers from 0 to {total - 1}, ascending."
        )
    return indices


def refuse_unprunable(model: PreTrainedModel) -> None:
    if is_peft(model):
        raise ConfigurationError(
            "Got a PEFT model; layers are taken from a plain one. Call `model.merge_and_unload()` first."
        )
    if getattr(model, "is_quantized", False):
        raise ConfigurationError(
            "Got a quantised model, whose layers cannot be trained; load the teacher in bfloat16 or float32 to take "
            "layers from it."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigurationError("Got a model of which weights are offloaded or missing; load it whole into memory.")
    if any(hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ConfigurationError("Got a sharded model; take the layers before DeepSpeed or FSDP wraps the teacher.")


def _renumber(layers: nn.ModuleList) -> None:
    """The KV cache is addressed by `layer_idx`, which attention modules got when the larger model was built."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]  # torch types attributes as tensors or modules


def _shrink_config(config: PretrainedConfig, indices: list[int], total: int) -> None:
    config.num_hidden_layers = len(indices)
    for name in config.to_dict():
        value = getattr(config, name, None)  # several EOS ids may happen to be as many as the layers
        if isinstance(value, list) and len(value) == total and not name.endswith("_token_id"):
            setattr(config, name, [value[index] for index in indices])
    remember_layers(config, indices, total)


def remember_layers(config: PretrainedConfig, kept: Sequence[int], total: int) -> None:
    """Write into a config which of `total` layers are left; nothing where all are."""
    for name, value in ((_KEPT_LAYERS, list(kept)), (_KEPT_OF, total)):
        if len(kept) < total:
            setattr(config, name, value)
        elif hasattr(config, name):  # of the larger model before this one
            delattr(config, name)


def remembered_layers(config: PretrainedConfig) -> tuple[list[int], int]:
    """Return which layers a model kept of the one it was made of, and how many that had; none of 0 if not known."""
    return getattr(config, _KEPT_LAYERS, None) or [], getattr(config, _KEPT_OF, None) or 0


def check_config_describes(model: PreTrainedModel) -> None:
    """Refuse a model that would come back different from disk."""
    with torch.device("meta"):
        rebuilt = type(model)(deepcopy(model.config))
    expected = {name: value.shape for name, value in rebuilt.state_dict().items()}
    got = {name: value.shape for name, value in model.state_dict().items()}
    if expected != got:
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise ConfigurationError(
            f"The config of {type(model).__name__} does not describe the kept layers ({', '.join(differing[:4])}): it "
            "says by number which layers are special. Keep the first layers, or use a ready-made student."
        )
