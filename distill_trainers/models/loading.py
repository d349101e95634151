"""Models and tokenizers by folder or Hub id."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..exceptions import ConfigurationError
from ..reachable import why_out_of_reach
from ..redaction import hidden
from .adapters import causal_lm_of
from .whole import first_words, heads_of, load_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
# Arguments of `from_pretrained` that say which files are read: config, tokenizer and weights must come from the same.
_WHICH_FILES = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only", "proxies")


def looks_like_path(name: str) -> bool:
    """Tell whether `name` means a local folder: it or its parent exists, or it could not be a Hub id."""
    inside = "/" in name and os.path.isdir(Path(name).parent)
    return os.path.exists(name) or inside or name.startswith((".", "/", "~")) or name.count("/") > 1


def check_model_source(name: str, role: str) -> None:
    """Refuse a local model folder that is missing or empty, before anything is loaded.

    Raises:
        ConfigurationError: the folder, or its `config.json`, is not there, or it holds an adapter alone.
    """
    if not looks_like_path(name):
        return
    folder = Path(os.path.expanduser(name))
    if not os.path.isdir(folder):  # false too of names that no folder can have
        raise ConfigurationError(
            f"The {role} model {name!r} is not a folder on this machine and not a Hub id (`owner/name`). "
            "Check the path, or import a GGUF file first with `distill-trainers import-gguf`."
        )
    if (folder / "config.json").is_file():
        _check_generation_config(folder / "generation_config.json", role)
        return
    if (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            f"The {role} model folder {name!r} holds a PEFT adapter, not a whole model. Merge it into its base first "
            "(`AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(…)`), or load it in "
            "Python and pass the model."
        )
    raise ConfigurationError(
        f"The {role} model folder {name!r} holds no `config.json`, so it is not a saved Hugging Face model. "
        f"It holds: {sorted(p.name for p in folder.iterdir())[:8]}. Point to the folder `save_pretrained` wrote."
    )


def _check_generation_config(file: Path, role: str) -> None:
    """Refuse a file that transformers would pass over, and with it the tokens that end an answer."""
    try:
        told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise ConfigurationError(
            f"The {role} model's {str(file)!r} is damaged: it is not JSON with settings by name. Fetch it again, or "
            "delete it: then the settings of `config.json` hold."
        )


def _ways(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Where, and through what, `from_pretrained` gets its files."""
    return {key: kwargs[key] for key in ("cache_dir", "proxies") if key in kwargs}


def load_config(name: str, role: str, *, kind: Any = None, **kwargs: Any) -> Any:
    """Load the configuration of a model given by folder or Hub id.

    Args:
        kind: the model's class, where it is one of the user's own: transformers need not know its configuration.

    Raises:
        ConfigurationError: it is not there, cannot be fetched, or is of a kind that transformers does not know.
    """
    from transformers import AutoConfig

    check_model_source(name, role)
    if not looks_like_path(name) and (away := why_out_of_reach(name, **_ways(kwargs))):
        raise ConfigurationError(
            f"The {role} model {name!r} is no folder here, {away}. Check the name and this machine's network; a model "
            "that lies on this machine goes by its folder."
        )
    try:
        config_class = getattr(kind, "config_class", None) or AutoConfig
        return config_class.from_pretrained(name, **{"trust_remote_code": False, **kwargs})
    except Exception as error:  # a damaged file fails in as many ways as there are values
        if "contains custom code" in str(error):
            raise ConfigurationError(
                f"The {role} model {name!r} brings code of its own, which runs only where you say so. Read it, and set "
                "`trust_remote_code: true`, or take a model whose kind transformers knows."
            ) from error
        raise ConfigurationError(
            f"The configuration of the {role} model {name!r} cannot be read: {first_words(error)}. Check the path or "
            "Hub id, and that this machine reaches the Hub (`hf auth login` for private models)."
        ) from error


def settled_kwargs(given: Mapping[str, Any] | None, setting: str) -> dict[str, Any]:
    """Return arguments of `from_pretrained` in one spelling: `torch_dtype` as `dtype`, and none that is None.

    Args:
        setting: where they were given, for messages.

    Raises:
        ConfigurationError: two dtypes that differ, or one that is not known.
    """
    if not isinstance(given, Mapping | None) or not all(isinstance(name, str) for name in given or ()):
        raise ConfigurationError(
            f"Got `{setting}: {hidden(given)!r}`; expected arguments of `from_pretrained` by name. Write a mapping, "
            "such as {'dtype': 'bfloat16'}."
        )
    kwargs = {name: value for name, value in (given or {}).items() if value is not None}
    if kwargs.pop("output_loading_info", False):
        raise ConfigurationError(
            f"Got `output_loading_info` in `{setting}`, which asks for more than a model. Leave it out."
        )
    older = kwargs.pop("torch_dtype", None)
    if older is not None and _dtype_name(kwargs.get("dtype", older)) != _dtype_name(older):
        raise ConfigurationError(
            f"Got `{setting}` with both `dtype: {_dtype_name(kwargs['dtype'])}` and its older name `torch_dtype: "
            f"{_dtype_name(older)}`, which differ; keep `dtype`."
        )
    if older is not None:
        kwargs["dtype"] = older
    dtype = kwargs.get("dtype")
    if dtype is not None and not isinstance(dtype, torch.dtype) and _dtype_name(dtype) not in _DTYPES:
        raise ConfigurationError(
            f"Got dtype {dtype!r} in `{setting}`; expected one of {', '.join(_DTYPES)}, or a torch.dtype."
        )
    if isinstance(dtype, str):
        kwargs["dtype"] = _dtype_name(dtype)
    return kwargs


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def which_files(init_kwargs: Mapping[str, Any] | None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Select the arguments of `from_pretrained` with which a model's config and tokenizer must be read as well."""
    chosen = {name: value for name, value in (init_kwargs or {}).items() if name in _WHICH_FILES and value is not None}
    return {"trust_remote_code": trust_remote_code, **chosen}


def load_causal_lm(
    name: str, *, role: str = "student", quantization_config: Any = None, kind: Any = None, **init_kwargs: Any
) -> Any:
    """Load a causal LM (or encoder-decoder) by folder or Hub id. `dtype` may be a string; no `device_map` is guessed.

    Args:
        kind: the model's class, where it is one of the user's own.

    Raises:
        ConfigurationError: an unknown dtype or argument, a missing folder, or quantization named twice; files that are
            damaged, or do not hold the whole model (see `load_whole`).
    """
    check_model_source(name, role)
    setting = "model_init_kwargs" if role == "student" else f"{role}_model_init_kwargs"
    kwargs = settled_kwargs(init_kwargs, setting)
    if isinstance(kwargs.get("dtype"), str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    if quantization_config is not None:
        refuse_two_quantizations(kwargs, setting)
        kwargs["quantization_config"] = quantization_config
    config = load_config(name, role, kind=kind, **which_files(kwargs))
    kind, what = kind or model_class(config), f"The {role} model {name!r}"
    # Loaded in another dtype, torchao's integers would keep scales of their own, and no product would fit.
    later = kwargs.pop("dtype", None) if _holds_integers(config) else None
    try:
        model = load_whole(kind, name, what, **kwargs)
        return model.to(later) if isinstance(later, torch.dtype) else model
    except (torch.OutOfMemoryError, ConfigurationError):
        raise
    except Exception as error:  # each library has its own, and damaged files have more
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            raise ConfigurationError(
                f"Got `{setting}` with an argument that neither `from_pretrained` nor the {role}'s class takes: "
                f"{error}. Leave it out."
            ) from error
        if isinstance(error, UnpicklingError):  # torch's own message says how to run it all the same
            raise ConfigurationError(
                f"{what} has pickled weights that are damaged, or would run code while they are read. Take one in "
                "safetensors."
            ) from error
        for file in sorted(Path(os.path.expanduser(name)).glob("*.safetensors")):
            heads_of(file, what)  # names the one that is damaged
        given = ", ".join(sorted(kwargs)) or "nothing"
        raise ConfigurationError(
            f"{what} cannot be loaded: {first_words(error)}. Expected a whole model that takes what "
            f"`from_pretrained` was given ({given}); look at its folder or Hub id, and at `{setting}`."
        ) from error


def _holds_integers(config: Any) -> bool:
    told = getattr(config, "quantization_config", None) or {}
    return "torchao" in str(told.get("quant_method") if isinstance(told, Mapping) else told.quant_method).lower()


def refuse_two_quantizations(init_kwargs: Mapping[str, Any], setting: str) -> None:
    """Refuse a quantization within the arguments of `from_pretrained` where another is given beside them."""
    if init_kwargs.get("quantization_config") is not None:
        raise ConfigurationError(
            f"Got a quantization both as `quantization_config` and in `{setting}`; expected one. Keep the argument "
            "`quantization_config` (in a recipe: `load_in_4bit`)."
        )


def with_overrides(config: Any, init_kwargs: Mapping[str, Any]) -> Any:
    """Return a configuration as `from_pretrained` with these arguments makes it: a config of its own, or set values."""
    if init_kwargs.get("config") is not None and not isinstance(init_kwargs["config"], str):
        return init_kwargs["config"]
    for name in init_kwargs.keys() - {"dtype", *_WHICH_FILES}:
        if name in vars(config):
            setattr(config, name, init_kwargs[name])
    return config


def dtype_of(dtype: Any, config: Any) -> torch.dtype:
    """Return the dtype that `from_pretrained(dtype=…)` gives a model of this config; None and "auto" keep its own."""
    if dtype in (None, "auto"):
        dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def model_class(config: Any) -> Any:
    """Return the auto class that loads a model of this configuration for generation."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def is_encoder_decoder(model: nn.Module) -> bool:
    """Tell whether the model reads prompts with an encoder (T5 and its relatives)."""
    return bool(getattr(getattr(causal_lm_of(model), "config", None), "is_encoder_decoder", False))


def decoder_start(config: Any) -> int | None:
    """Return the token that an encoder-decoder's decoder starts from; None for a causal LM."""
    if not getattr(config, "is_encoder_decoder", False):
        return None
    if config.decoder_start_token_id is None:
        raise ConfigurationError(
            f"The {config.model_type} is an encoder-decoder without `decoder_start_token_id` in its config; set it "
            "(T5 has its padding token there)."
        )
    return int(config.decoder_start_token_id)


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id, with a pad token (EOS where none is defined).

    Raises:
        ConfigurationError: its files are damaged, or it has neither a pad nor an EOS token.
        OSError, ValueError: there is none.
    """
    from transformers import AutoTokenizer

    if not looks_like_path(name) and (away := why_out_of_reach(name, **_ways(kwargs))):
        raise OSError(f"{name!r} is no folder here, {away}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False, **kwargs})
    except Exception as error:  # a damaged file fails in as many ways as there are values
        broken = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
        if isinstance(error, (OSError, ValueError, ImportError)) and not broken:
            raise
        raise ConfigurationError(
            f"The tokenizer of {name!r} cannot be read: {first_words(error)}. Its `tokenizer.json` or "
            "`tokenizer_config.json` is damaged; fetch them again."
        ) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token is None:
        raise ConfigurationError(
            f"The tokenizer of {name!r} has neither a pad nor an EOS token. Its `tokenizer_config.json` names them, if "
            "it is whole; else set one: `tokenizer.eos_token = '…'`."
        )
    return with_pad_token(tokenizer)


def tokenizer_of(name: str, role: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model that has to have one.

    Raises:
        ConfigurationError: the model, or its tokenizer, is not there or cannot be read.
    """
    load_config(name, role, **which_files(kwargs))
    try:
        return load_tokenizer(name, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(
            f"The {role} model {name!r} has no tokenizer that can be read: {first_words(error)}. Look for its "
            "`tokenizer.json` there."
        ) from error


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give the tokenizer a pad token. Padding is always found by mask, so EOS serves."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigurationError(
                "The tokenizer has neither a pad nor an EOS token. Set one: `tokenizer.eos_token = '…'`."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def padding_id(tokenizer: PreTrainedTokenizerBase, known_ids: int) -> int:
    """Return an id to pad with that is below `known_ids`: a teacher may lack the student's padding token."""
    pad = tokenizer.pad_token_id
    return pad if 0 <= pad < known_ids else 0


def source_of(model: nn.Module) -> str | None:
    """Return the folder or Hub id a model came from, if it says."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def num_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Count the parameters of the model, ZeRO-3 partitions in full."""
    counted = (p for p in model.parameters() if p.requires_grad or not trainable_only)
    return sum(getattr(p, "ds_numel", p.numel()) for p in counted)


def recomputes_activations(args: Any) -> bool:
    """Tell whether a config asks for activation checkpointing, by its present name or transformers 5.19's."""
    return any(getattr(args, name, None) for name in ("activation_checkpointing", "gradient_checkpointing"))
