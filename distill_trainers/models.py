"""The one file that touches fast-moving or private parts of transformers, PEFT, TRL, DeepSpeed and FSDP.

Everything above it sees three ideas only: a causal LM that can be run up to its last hidden states *through its
wrapper* (`install_token_forward`, `run_on_hidden`), its output `Head`, and the context in which it can generate.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .exceptions import ConfigurationError
from .signals import Head

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OnHidden = Callable[[Tensor, Head], Any]

# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------

_DTYPES = ("auto", "bfloat16", "float16", "float32")


def looks_like_path(name: str) -> bool:
    """Whether `name` is meant as a local folder: it or its parent exists, or it could not be a Hub id."""
    inside = "/" in name and Path(name).parent.is_dir()
    return Path(name).exists() or inside or name.startswith((".", "/", "~")) or name.count("/") > 1


def check_model_source(name: str, role: str) -> None:
    """Refuse a local model folder that is missing or empty, before anything is loaded.

    Raises:
        ConfigurationError: the folder, or its `config.json`, is not there, or it holds an adapter alone.
    """
    if not looks_like_path(name):
        return
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigurationError(
            f"The {role} model {name!r} is not a folder on this machine and not a Hub id (`owner/name`). "
            "Check the path, or import a GGUF file first with `distill-trainers import-gguf`."
        )
    if (folder / "config.json").is_file():
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


def load_config(name: str, role: str, **kwargs: Any) -> Any:
    """The configuration of a model given by folder or Hub id.

    Raises:
        ConfigurationError: it is not there, cannot be fetched, or is of a kind that transformers does not know.
    """
    from transformers import AutoConfig

    check_model_source(name, role)
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigurationError(
            f"The configuration of the {role} model {name!r} cannot be read: {reason}. Check the path or Hub id, and "
            "that this machine reaches the Hub (`hf auth login` for private models)."
        ) from error


def load_causal_lm(name: str, *, role: str = "student", quantization_config: Any = None, **init_kwargs: Any):
    """Load a causal LM (or encoder-decoder) by folder or Hub id. `dtype` may be a string; no `device_map` is guessed.

    Raises:
        ConfigurationError: unknown dtype, missing folder, or quantization named twice.
    """
    check_model_source(name, role)
    dtype = init_kwargs.get("dtype", "auto")
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ConfigurationError(f"Got dtype {dtype!r} for the {role}; expected one of {', '.join(_DTYPES)}.")
        init_kwargs["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    if quantization_config is not None:
        if "quantization_config" in init_kwargs:
            raise ConfigurationError(
                f"`quantization_config` was given for the {role} both as an argument and in its init kwargs; "
                "keep the argument."
            )
        init_kwargs["quantization_config"] = quantization_config
    known = {key: init_kwargs[key] for key in ("revision", "trust_remote_code") if key in init_kwargs}
    return model_class(load_config(name, role, **known)).from_pretrained(name, **init_kwargs)


def load_merged_adapter(name: str, *, role: str = "student", **init_kwargs: Any) -> Any:
    """The base model of a folder that holds a PEFT adapter alone, with the adapter merged into it."""
    from peft import PeftModel

    base = json.loads((Path(name).expanduser() / "adapter_config.json").read_text(encoding="utf-8"))
    model = load_causal_lm(base["base_model_name_or_path"], role=role, **init_kwargs)
    return PeftModel.from_pretrained(model, name).merge_and_unload()


def model_class(config: Any) -> Any:
    """The auto class that loads a model of this configuration for generation."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads prompts with an encoder (T5 and its relatives)."""
    return bool(getattr(getattr(causal_lm_of(model), "config", None), "is_encoder_decoder", False))


def decoder_start(config: Any) -> int | None:
    """The token that an encoder-decoder's decoder starts from; None for a causal LM."""
    if not getattr(config, "is_encoder_decoder", False):
        return None
    if config.decoder_start_token_id is None:
        raise ConfigurationError(
            f"The {config.model_type} is an encoder-decoder without `decoder_start_token_id` in its config; set it "
            "(T5 has its padding token there)."
        )
    return int(config.decoder_start_token_id)


def forward_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What of a batch a model's forward takes; with `encoder_ids`, `input_ids` are the decoder's."""
    if "encoder_ids" not in batch:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}
    names = {"input_ids": "encoder_ids", "attention_mask": "encoder_mask"}
    names |= {"decoder_input_ids": "input_ids", "decoder_attention_mask": "attention_mask"}
    return {name: batch[entry] for name, entry in names.items()}


@contextlib.contextmanager
def whole_loading() -> Iterator[None]:
    """Within it, `from_pretrained` loads whole weights on this process also when ZeRO-3 is configured."""
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id, with a pad token (EOS where none is defined)."""
    from transformers import AutoTokenizer

    return with_pad_token(AutoTokenizer.from_pretrained(name, **kwargs))


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give the tokenizer a pad token. Padding is always found by mask, so EOS serves."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigurationError(
                "The tokenizer has neither a pad nor an EOS token. Set one: `tokenizer.eos_token = '…'`."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def source_of(model: nn.Module) -> str | None:
    """The folder or Hub id a model came from, if it says."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def num_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Parameters of the model, counting ZeRO-3 partitions in full."""
    counted = (p for p in model.parameters() if p.requires_grad or not trainable_only)
    return sum(getattr(p, "ds_numel", p.numel()) for p in counted)


def recomputes_activations(args: Any) -> bool:
    """Whether a config asks for activation checkpointing, by its present name or that of transformers 5.19."""
    return any(getattr(args, name, None) for name in ("activation_checkpointing", "gradient_checkpointing"))


# ---------------------------------------------------------------------------------------------------------------------
# PEFT
# ---------------------------------------------------------------------------------------------------------------------


def is_peft(model: nn.Module) -> bool:
    from transformers.utils import is_peft_available

    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def add_adapter(model: PreTrainedModel, peft_config: Any, gradient_checkpointing: bool = False) -> nn.Module:
    """Wrap `model` with a new PEFT adapter (k-bit models are prepared first).

    Raises:
        ConfigurationError: the model already has an adapter, the method trains virtual tokens, or the adapter names
            modules that the model does not have.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    if is_peft(model):
        raise ConfigurationError(
            "Got a PeftModel together with `peft_config`. Pass the PeftModel alone to go on training its adapter, "
            "or `model.merge_and_unload()` first to start a new one."
        )
    if getattr(peft_config, "is_prompt_learning", False):
        raise ConfigurationError(
            f"{type(peft_config).__name__} trains virtual prompt tokens, which shift every position of the student "
            "against its teacher's. Use LoRA or another adapter of the weights."
        )
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ConfigurationError(
            f"The adapter does not fit {type(model).__name__}: {error} Set `lora_target_modules` to names of its "
            "linear layers, or to `all-linear`."
        ) from error


def merged_copy(model: Any) -> PreTrainedModel:
    """The causal LM of a whole PeftModel with its adapter merged, on the CPU; the model itself is left as it is.

    Merging into the model and out of it again would round its weights.
    """
    # What is shared stays shared: a copy finds a tensor's stand-in by the tensor.
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        moved = nn.Parameter(parameter.detach().to("cpu", copy=True), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = moved
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    return without_token_forward(copy.deepcopy(model, memo).merge_and_unload())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside any stack of DDP, FSDP and DeepSpeed wrappers; a PeftModel stays one."""
    # Wrappers pass attribute look-ups on, so ask for their own submodules.
    while (inner := model._modules.get("module")) is not None and not is_peft(model):
        model = inner
    return model


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside any stack of PEFT, DDP, FSDP and DeepSpeed wrappers."""
    model = unwrapped(model)
    return model.get_base_model() if is_peft(model) else model  # type: ignore[return-value, operator]


# ---------------------------------------------------------------------------------------------------------------------
# Running a model up to its hidden states, inside its wrapper
# ---------------------------------------------------------------------------------------------------------------------


def install_token_forward(model: nn.Module) -> nn.Module:
    """Teach the causal LM inside `model` the keyword `on_hidden`.

    `wrapper(input_ids=…, on_hidden=f)` runs the backbone and returns `f(last_hidden_state, head)`; without the keyword
    nothing changes. Since `f` runs inside the forward of the *wrapped* model, autocast applies to the backbone, DDP
    and FSDP see the graph, and under ZeRO-3 the head's weight is whole (`f` runs inside the head module's own call).
    Must be called before the model is wrapped, because accelerate wraps the forward it finds.
    """
    causal_lm: Any = causal_lm_of(model)  # it gets attributes of ours
    if "_distill_original_forward" in causal_lm.__dict__:
        return model
    causal_lm._distill_original_forward = causal_lm.forward

    @functools.wraps(type(causal_lm).forward)  # keeps the signature that `generate` and PEFT inspect
    def forward(self, *args: Any, on_hidden: OnHidden | None = None, **kwargs: Any) -> Any:
        if on_hidden is None:
            return self._distill_original_forward(*args, **kwargs)
        # PEFT passes labels, return_dict and the like along as None.
        inputs = {k: v for k, v in kwargs.items() if v is not None and k not in ("labels", "return_dict")}
        hidden = self.base_model(*args, **{"use_cache": False, **inputs}).last_hidden_state
        return _inside_head(self, hidden, on_hidden)

    causal_lm.forward = MethodType(forward, causal_lm)  # a bound method, so that deepcopy binds it to the copy
    return model


def without_token_forward(model: Any) -> Any:
    """Undo `install_token_forward`."""
    causal_lm: Any = causal_lm_of(model)
    for name in ("forward", "_distill_original_forward", "_distill_head_is_known"):
        causal_lm.__dict__.pop(name, None)
    return model


def gives_hidden_states(model: nn.Module) -> bool:
    """Whether `on_hidden` is installed, and the head is one product whose logits this package knows how to rebuild.

    What a model that is not known here does to its logits is found out by `head_reproduces_logits`; it is remembered
    with the model, since it takes two forwards.
    """
    causal_lm: Any = causal_lm_of(model)
    if "_distill_original_forward" not in causal_lm.__dict__ or not head_is_fusable(model):
        return False
    if "_distill_head_is_known" not in causal_lm.__dict__:
        some = torch.arange(4, device=next(causal_lm.parameters()).device).unsqueeze(0)
        inputs = {"input_ids": some, "attention_mask": torch.ones_like(some)}
        causal_lm._distill_head_is_known = head_reproduces_logits(model, inputs)
    return causal_lm._distill_head_is_known


def _inside_head(causal_lm: PreTrainedModel, hidden: Tensor, on_hidden: OnHidden) -> Any:
    """Call `on_hidden` as if it were the forward of the head module, so that ZeRO-3 gathers the head's weight."""
    module = _head_module(causal_lm)
    own = module.__dict__.get("forward")
    module.forward = lambda hidden: on_hidden(hidden, read_head(causal_lm))
    try:
        return module(hidden)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _head_module(causal_lm: PreTrainedModel) -> nn.Module:
    module = causal_lm.get_output_embeddings()
    if module is None:
        raise ConfigurationError(f"{type(causal_lm).__name__} has no output embeddings; a causal LM was expected.")
    # PEFT's modules_to_save keeps a trained copy beside the frozen original.
    active = getattr(module, "active_adapters", None)
    if hasattr(module, "modules_to_save") and active:
        return module.modules_to_save[active[0]]
    return module


def read_head(causal_lm: PreTrainedModel) -> Head:
    """The output head with all that the model does to its logits. The weight must be whole (see `_inside_head`)."""
    module = _head_module(causal_lm)
    config = causal_lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is None and getattr(config, "logits_scaling", None):  # Granite
        scale = 1.0 / config.logits_scaling
    if scale is None:
        scale = getattr(config, "lm_head_multiplier", None)  # Falcon-H1
    return Head(
        weight=_head_weight(module),
        bias=getattr(getattr(module, "base_layer", module), "bias", None),
        scale=float(scale) if scale is not None else 1.0,
        soft_cap=getattr(config, "final_logit_softcapping", None),  # Gemma 2
    )


def _head_weight(module: nn.Module) -> Tensor:
    """The head's effective weight; a LoRA on the head is added to it, so that it is trained and not ignored."""
    base = getattr(module, "base_layer", None)
    if base is None:
        return module.weight  # type: ignore[return-value]
    weight = base.weight
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return weight
    for adapter in module.active_adapters:  # type: ignore[union-attr]
        if adapter in module.lora_A:  # type: ignore[operator]
            weight = weight + module.get_delta_weight(adapter).to(weight.dtype)  # type: ignore[operator]
    return weight


def head_is_fusable(model: nn.Module) -> bool:
    """Whether the head is one matrix product: a Linear, or a plain LoRA on one (no dropout, no DoRA)."""
    module: Any = _head_module(causal_lm_of(model))
    if isinstance(module, nn.Linear) and not hasattr(module, "base_layer"):
        return True
    base = getattr(module, "base_layer", None)
    if not isinstance(base, nn.Linear) or not hasattr(module, "lora_A") or hasattr(base.weight, "ds_id"):
        return False
    dropout = any(not isinstance(layer, nn.Identity) for layer in module.lora_dropout.values())
    variants = bool(getattr(module, "lora_variant", None)) or any(getattr(module, "use_dora", {}).values())
    return not dropout and not variants


@torch.no_grad()
def head_reproduces_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether hidden states and `Head` give the model's own logits on `inputs`: guards against unknown logit changes.

    Runs `model` (wrapped or not) twice on a few tokens. Collective under ZeRO-3 and FSDP.
    """
    causal_lm = causal_lm_of(model)
    if causal_lm.base_model is causal_lm:  # its backbone goes by a name that its class does not tell
        return False
    few = {name: value[:1, :16] for name, value in inputs.items()}
    was_training = model.training
    model.eval()
    full_precision = True

    def rebuild(hidden: Tensor, head: Head) -> Tensor:
        nonlocal full_precision
        autocast = torch.is_autocast_enabled(hidden.device.type)
        full_precision = not autocast and {hidden.dtype, head.weight.dtype} <= {torch.float32, torch.float64}
        return head.logits(hidden[0])

    ours = model(**few, on_hidden=rebuild)
    theirs = model(**few).logits[0]
    model.train(was_training)
    ours, theirs = ours[:, : theirs.shape[-1]].double(), theirs.double()
    keep = few.get("decoder_attention_mask", few["attention_mask"])[0].bool()
    error = (ours - theirs)[keep].norm() / theirs[keep].norm().clamp_min(1e-30)
    return bool(error < (1e-3 if full_precision else 0.05))  # bfloat16 rounding stays near 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Sharding and generation
# ---------------------------------------------------------------------------------------------------------------------


def zero_stage(accelerator: Accelerator) -> int | None:
    """DeepSpeed's ZeRO stage, or None without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else plugin.zero_stage


def fsdp_version(accelerator: Accelerator) -> int | None:
    """FSDP's version, or None without FSDP."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return None if plugin is None else getattr(plugin, "fsdp_version", 1)


def prepare_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Freeze `model`, put it in eval mode and prepare it for the launch it finds.

    ZeRO-3: its own inference engine, so that parameters are gathered layer by layer. FSDP2: sharded layer by layer.
    Otherwise: whole on every process.
    """
    model.requires_grad_(False)
    model.eval()
    if zero_stage(accelerator) == 3:
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    if fsdp_version(accelerator) == 2:
        return _shard_frozen(model, accelerator)
    if not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):
        model.to(accelerator.device)
    return model


def _shard_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model.to(accelerator.device)
    for layers in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
        for layer in layers:
            fully_shard(layer)
    fully_shard(model)
    return model


@contextlib.contextmanager
def whole_parameters(*parameters: Tensor | None) -> Iterator[None]:
    """Within it, the given parameters are whole on every process. Free of cost where they already are."""
    partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of an FSDP2 shard (collective); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def must_stay_in_step(model: nn.Module) -> bool:
    """Whether a forward of `model` may wait for other processes (ZeRO-3, FSDP2), so that all must run equally many."""
    from torch.distributed.fsdp import FSDPModule

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return False
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return partitioned or any(isinstance(module, FSDPModule) for module in model.modules())


@contextlib.contextmanager
def uploading(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Within it, what a `Trainer` asks of `HfApi.upload_folder` goes through `change`, keyword arguments in and out.

    transformers has its own patterns of files to leave out and no way to add to them.
    """
    from transformers import trainer as module

    own = module.hf_api

    class Api:
        def __getattr__(self, name: str) -> Any:
            return getattr(own(), name)

        def upload_folder(self, **kwargs: Any) -> Any:
            return own().upload_folder(**change(kwargs))

    module.hf_api = Api  # type: ignore[assignment]  # it has what a Trainer asks of one
    try:
        yield
    finally:
        module.hf_api = own


@contextlib.contextmanager
def generating(model: nn.Module, accelerator: Accelerator) -> Iterator[Any]:
    """Yield the unwrapped model, ready to generate: eval mode, whole weights, KV cache on also under checkpointing."""
    from trl.models.utils import unwrap_model_for_generation

    was_training = model.training
    # Left on, TRL would switch checkpointing off and on again, and forget its settings.
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    model.eval()
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        with torch.no_grad(), unwrap_model_for_generation(model, accelerator) as unwrapped:
            yield unwrapped
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        model.train(was_training)


def eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS and those of the model's generation config."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys(own + generation_eos_ids(model)))


def generation_eos_ids(model: nn.Module) -> list[int]:
    """Tokens that end a completion by the model's generation config."""
    ids = getattr(getattr(causal_lm_of(model), "generation_config", None), "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to zero: modules, and the probabilities that attention layers pass to kernels."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
