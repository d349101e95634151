"""Loading weights whole or not at all: what transformers and PEFT put up with, and say in a warning, is refused.

`from_pretrained` fills what a file lacks at random, and drops what the model has no place for.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..exceptions import ConfigurationError
from .sharding import whole_loading

_NAMED = 4
# Buffers that follow from the config: older versions of transformers saved them, or newer ones do.
_FIXED_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|masked_bias|position_ids|(attn|attention|self_attention)\.(bias|causal_mask)|version)$"
)
# Parts of checkpoints that no causal LM has: layers that predict several tokens ahead; BERT's task of next sentences.
_OTHER_PARTS = re.compile(r"(^|\.)(mtp\w*|pooler|seq_relationship)\.")
# What a text class leaves out of a checkpoint of text and other things.
_OTHER_SENSES = re.compile(r"(^|\.)\w*(vision|visual|image|audio|speech|multi_modal|projector|aligner)\w*\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def named_few(tensors: Collection[str]) -> str:
    """Count tensors and name the first of them."""
    first, more = sorted(tensors)[:_NAMED], ", …" if len(tensors) > _NAMED else ""
    return f"{len(tensors)} tensor{'s' * (len(tensors) != 1)} ({', '.join(first)}{more})"


def first_words(error: Exception) -> str:
    """Return what an error of a library says, in one line; with its class where the words alone mean little."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    words = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).rstrip(".")
    if words and isinstance(error, OSError | RuntimeError | ValueError):
        return words
    return f"{type(error).__name__}: {words}".rstrip(": ")


def heads_of(file: Path, what: str) -> dict[str, torch.Tensor]:
    """Read names and shapes of a safetensors file, as tensors on the meta device.

    Raises:
        ConfigurationError: it cannot be read.
    """
    from transformers.modeling_utils import load_state_dict

    try:
        return load_state_dict(file, map_location="meta")
    except Exception as error:
        raise ConfigurationError(
            f"{what} cannot be loaded: {file} is damaged, cut short or away ({first_words(error)}). Fetch it again."
        ) from error


def load_whole(kind: Any, name: Any, what: str, **kwargs: Any) -> Any:
    """Load a model by `kind.from_pretrained`, whole; no other code of the package calls it.

    Args:
        kind: a model's class, or an auto class.
        name: a folder or Hub id.
        what: it is, for messages.

    Raises:
        ConfigurationError: tensors are missing, too many or of another shape, unless the architecture says so.
    """
    # Told to ignore other shapes, transformers names them.
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _listening(what):
        model, info = kind.from_pretrained(name, **kwargs)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigurationError(
            f"{what} holds a model and a PEFT adapter, of which transformers takes the adapter, with a base of its own "
            "choice. Expected one of them: move `adapter_config.json` and the adapter's weights to another folder."
        )
    refuse_partial(info, model, what)
    return model


def refuse_partial(info: Mapping[str, Any], model: Any, what: str) -> None:
    """Refuse a model whose weights did not all come from its files, or that has no place for all of them.

    Args:
        info: what transformers tells with `output_loading_info=True`, by its names.

    Raises:
        ConfigurationError: naming the tensors.
    """
    missing = [key for key in info["missing_keys"] if not _FIXED_BUFFERS.search(key)]
    unexpected = [key for key in info["unexpected_keys"] if not _is_left_out(key, model)]
    shapes = {key: f"{key}: {list(in_file)}, not {list(made)}" for key, in_file, made in info["mismatched_keys"]}
    kind, problems = type(model).__name__, []
    if missing:
        problems.append(f"{named_few(missing)} of {kind} are not in its files and would be random")
    if unexpected:
        problems.append(f"{named_few(unexpected)} of its files have no place in {kind}")
    if shapes:
        problems.append(f"{named_few(shapes.values())} have another shape than its config says")
    if not problems:
        return
    if _untrained_head(model, missing):
        remedy = "So it has no trained head, as base models and classifiers have none; expected a causal language model"
    else:
        remedy = (
            "Expected config and weights of one model. Fetch it again; or, if it is meant so, load it in Python and "
            "pass the model, or what `save_pretrained` makes of it"
        )
    raise ConfigurationError(f"{what} is not whole: {'; '.join(problems)}. {remedy}.")


def _untrained_head(model: Any, missing: Collection[str]) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    path = next((name for name, module in model.named_modules() if module is head), None)
    return path is not None and f"{path}.weight" in missing


def _is_left_out(key: str, model: Any) -> bool:
    """Tell whether a tensor that is in a model's files, and not in the model, is none of its weights."""
    if _FIXED_BUFFERS.search(key) or _OTHER_PARTS.search(key):
        return True
    text = model.config.get_text_config(decoder=True)
    ahead, layer = getattr(text, "num_nextn_predict_layers", None) or 0, _LAYER.search(key)
    if layer and 0 <= int(layer[1]) - text.num_hidden_layers < ahead:
        return True
    owner, _, kind = key.rpartition(".")
    if getattr(model, "is_quantized", False) and kind not in ("weight", "bias"):  # scales that its kernels do not use
        return any(name == owner for name, _ in model.named_modules())
    return text is model.config and _OTHER_SENSES.search(key) is not None


# ---- Adapters -------------------------------------------------------------------------------------------------------


def load_whole_adapter(peft: Any, source: str, name: str, what: str) -> None:
    """Load the weights of a frozen adapter into a PEFT model, whole.

    Args:
        source: a folder or Hub id.
        name: of the adapter in the model, which may have it already.
        what: it is, for messages.

    Raises:
        ConfigurationError: its tensors are missing, have no place in this base, or do not fit.
    """
    told = peft.load_adapter(source, adapter_name=name, is_trainable=False)
    problems = []
    if told.missing_keys:
        problems.append(f"{named_few(told.missing_keys)} are not in its files and would be random")
    if told.unexpected_keys:
        problems.append(f"{named_few(told.unexpected_keys)} of its files have no place in {type(peft).__name__}")
    if problems:
        raise ConfigurationError(
            f"{what} is not whole: {'; '.join(problems)}. Expected an adapter of this base, with the weights that its "
            "`adapter_config.json` says: fetch it again, or name the base that it was trained on."
        )


# ---- What transformers keeps to itself ------------------------------------------------------------------------------


@contextlib.contextmanager
def _listening(what: str) -> Iterator[None]:
    """Learn within it what `output_loading_info` leaves out: which weights could not be put together from those of a
    file (experts, of which one is missing), and all but missing ones where ZeRO-3 partitions what is loaded. There one
    process alone fails at a shape, and the others would wait for it."""
    from transformers import modeling_utils

    library: Any = modeling_utils
    report, partition = library.log_state_dict_report, library._load_state_dict_into_zero3_model

    def reported(*args: Any, loading_info: Any, **kwargs: Any) -> None:
        failed = {name.partition("\n")[0] for name in loading_info.conversion_errors}
        try:
            report(*args, loading_info=loading_info, **kwargs)
        except RuntimeError as error:
            if not failed:
                raise
            raise ConfigurationError(
                f"{what} is not whole: {named_few(failed)} cannot be put together from what its files hold. Expected "
                "all parts of each, as of each expert. Fetch it again."
            ) from error

    def compared(model: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        names = {key: torch.empty_like(value, device="meta") for key, value in state_dict.items()}
        compare_names(type(model), model.config, names, what)
        return partition(model, state_dict, *args, **kwargs)

    library.log_state_dict_report, library._load_state_dict_into_zero3_model = reported, compared
    try:
        yield
    finally:
        library.log_state_dict_report, library._load_state_dict_into_zero3_model = report, partition


def compare_names(kind: Any, config: Any, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Compare names and shapes alone, of tensors on the meta device, with those of a model.

    Args:
        kind: the model's own class.

    Raises:
        ConfigurationError: as `load_whole`.
    """
    with whole_loading(), _without_progress():
        model, info = kind.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=dict(tensors),
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    refuse_partial(info, model, what)


@contextlib.contextmanager
def _without_progress() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
