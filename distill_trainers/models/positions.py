"""How many positions a model was made for, and what it does with rows that have more."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from .adapters import causal_lm_of
from .loading import model_class
from .sharding import whole_loading
from .whole import compare_names, heads_of

# Arguments of `from_pretrained` by which other files, or these in another way, are read.
_OTHER_FILES = set("quantization_config subfolder variant state_dict gguf_file use_safetensors key_mapping".split())
_OFFSET = 2  # rows that OPT and its like keep free in their table


def positions_of(config: Any) -> int | None:
    """Return how many positions a causal LM was made for; None where its config does not say."""
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    rope = getattr(text, "rope_parameters", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if context and factor and original:  # some configs keep the number of positions before they were stretched
        return max(int(context), int(factor * original))
    return None if context is None else int(context)


def looks_positions_up(model: nn.Module) -> bool:
    """Tell whether a model has learnt a vector for each position: it has none for those beyond, and fails on them."""
    causal_lm: Any = causal_lm_of(model)
    context = positions_of(causal_lm.config)
    tables = [module for module in causal_lm.modules() if isinstance(module, nn.Embedding)]
    return context is not None and any(
        0 <= table.num_embeddings - context <= _OFFSET
        for table in tables
        if table is not causal_lm.get_input_embeddings()
    )


def without_weights(config: Any, **kwargs: Any) -> Any:
    """Make the causal LM of a config on the meta device: its layers, no weights."""
    with torch.device("meta"), whole_loading(), no_init_weights():  # without it, torch draws them on that device too
        model = model_class(config).from_config(config, **kwargs)
    model.tie_weights()
    return model


def check_files(name: Any, role: str, config: Any, init_kwargs: Mapping[str, Any]) -> None:
    """Refuse a local folder whose safetensors do not hold the whole model, before weights are read.

    Names and shapes are in the heads of the files. What cannot be judged by them, and Hub ids, are left to
    `load_causal_lm`, which looks at all.

    Args:
        config: the model's, with `init_kwargs`, which `from_pretrained` gets.

    Raises:
        ConfigurationError: a file is damaged or away; tensors are missing, too many or of another shape.
    """
    folder = Path(os.path.expanduser(str(name)))
    if _OTHER_FILES & init_kwargs.keys() or getattr(config, "quantization_config", None):
        return
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        shell = without_weights(copy.deepcopy(config))
        if single.is_file():
            files = [single]
        elif index.is_file():
            files = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            return
    except Exception:  # remote code, and what `load_causal_lm` names
        return
    tensors = {key: value for file in files for key, value in heads_of(file, f"The {role} model {name!r}").items()}
    compare_names(type(shell), shell.config, tensors, f"The {role} model {name!r}")


def beyond_positions(
    rows: str, role: str, context: int, *, absolute: bool, has_own_prompt: bool = False
) -> tuple[str, str]:
    """Say that rows are longer than a model's positions, and what to do about it.

    Args:
        rows: which rows, and how long they are.
        absolute: whether the model looks positions up in a table.
        has_own_prompt: whether the rows are a teacher's, who reads another prompt than the student: `max_length` cuts
            the student's rows alone.
    """
    limit = f"`max_length: {context}`"
    if has_own_prompt:
        limit = f"`teacher_max_length: {context}` with `teacher_too_long: drop`, shorten the prompts"
    effect = "fails on" if absolute else "was never trained on"
    return (
        f"{rows}, but the {role} was made for {context} positions and {effect} what lies beyond.",
        f"Set {limit}, or take a {role} with a longer context.",
    )
