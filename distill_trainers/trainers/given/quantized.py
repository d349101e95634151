"""What a student of integers (`quantize_student`) cannot be: from settings, configs and shapes, before weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ... import models
from ...exceptions import ConfigurationError
from ...settings import require

GROUP_SIZE = 32  # with 64, int4 of SmolLM2-135M begins a fifth farther from the original


def group_size_of(args: Any) -> int:
    """Return how many neighbouring weights share a scale."""
    return args.quantize_group_size or GROUP_SIZE


def check_quantization(args: Any) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigurationError: by name.
    """
    kind = args.quantize_student
    require(kind is None or kind in models.BITS, "quantize_student", kind, f"none or one of {', '.join(models.BITS)}")
    if kind is None:
        alone = "a `quantize_student` beside it, whose groups it is the size of; set that, or leave it out"
        require(args.quantize_group_size is None, "quantize_group_size", args.quantize_group_size, alone)
        return
    if args.merge_adapter:
        raise ConfigurationError(
            f"Got `merge_adapter: true` with `quantize_student: {kind}`: a merged weight would be rounded once more, "
            "and answer otherwise than what was trained. Leave one of them out."
        )
    if args.rollout_engine == "vllm" and args.samples_completions:
        raise ConfigurationError(
            f"Got `rollout_engine: vllm` with `quantize_student: {kind}`; expected an engine that runs the student "
            "itself, with its weights rounded as in training. Set `rollout_engine: decode`."
        )


def check_quantized(student: Any, config: Any, args: Any, quantized: bool = False) -> None:
    """Refuse a student that cannot be quantised.

    Args:
        student: a name or a model.
        config: the student's.
        quantized: whether its weights are loaded in 4 or 8 bits.

    Raises:
        ConfigurationError: it is quantised already, not in float32, no causal LM, has other layers than linear ones, or
            widths that are no multiples of the group size.
    """
    if args.quantize_student is None:
        return
    said, group_size = f"Got `quantize_student: {args.quantize_student}`", group_size_of(args)
    if quantized or getattr(config, "quantization_config", None) or getattr(student, "is_quantized", False):
        raise ConfigurationError(
            f"{said} with a student that is quantised already; expected one with weights that train. Name the "
            "original model, or go on with a run of it by `resume_from_checkpoint`; for an adapter on quantised "
            "weights leave `quantize_student` out."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(f"{said} with an encoder-decoder ({config.model_type}); expected a causal LM.")
    in_memory = isinstance(student, nn.Module)
    given = args.model_init_kwargs or {}
    shell = student
    if not in_memory:
        shell = models.without_weights(copy.deepcopy(config), trust_remote_code=args.trust_remote_code)
    layers = models.body_linears(shell)
    weights = {name: layer.weight for name, layer in layers.items()}
    dtypes = (
        {weight.dtype for weight in weights.values()}
        if in_memory
        else {models.dtype_of(given.get("dtype", "float32"), config)}
    )
    if dtypes - {torch.float32}:
        name = str((dtypes - {torch.float32}).pop()).removeprefix("torch.")
        raise ConfigurationError(
            f"{said} with a student in {name}; expected float32, in which small steps of a weight add up between two "
            "integers. Load it with `dtype: float32`; `bf16: true` computes in half precision all the same."
        )
    _refuse_other_layers(said, shell, weights)
    odd = {name: layer.in_features for name, layer in layers.items() if layer.in_features % group_size}
    if odd:
        name, width = next(iter(odd.items()))
        raise ConfigurationError(
            f"Got `quantize_group_size: {group_size}`, which does not divide the width of {name}, {width}; expected a "
            f"divisor of the widths of all linear layers, such as {_divisor(layers.values())}."
        )


def _refuse_other_layers(said: str, shell: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    causal_lm: Any = models.causal_lm_of(shell)
    tables = {id(m.weight) for m in causal_lm.modules() if isinstance(m, nn.Embedding)}
    head = causal_lm.get_output_embeddings()
    aside = tables | {id(weight) for weight in weights.values()} | ({id(head.weight)} if head is not None else set())
    others = {n: p for n, p in causal_lm.named_parameters() if p.dim() > 1 and id(p) not in aside and "lora" not in n}
    quantized = sum(weight.numel() for weight in weights.values())
    if quantized < sum(parameter.numel() for parameter in others.values()) or not weights:
        raise ConfigurationError(
            f"{said} with a {type(causal_lm).__name__}, most of whose weights are not those of linear layers (such as "
            f"{next(iter(others), 'none')}); expected a model of `nn.Linear` layers, as Llama, Qwen and Gemma are "
            "(GPT-2 and mixtures of experts are not). Leave `quantize_student` out."
        )


def _divisor(layers: Any) -> int:
    widths = [layer.in_features for layer in layers]
    return next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if all(width % size == 0 for width in widths))


def check_adapter(args: Any, adapter: Any) -> None:
    """Refuse adapters that read or change the weights below them, which are rounded.

    Args:
        adapter: a `PeftConfig`, or None.

    Raises:
        ConfigurationError: it is no plain LoRA.
    """
    if args.quantize_student is None or adapter is None:
        return
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    start = getattr(adapter, "init_lora_weights", True)
    if kind != "LORA":
        told = kind
    elif getattr(adapter, "use_dora", False):
        told = "LoRA with `use_dora`"
    elif isinstance(start, str) and start not in ("gaussian", "orthogonal"):
        told = f"LoRA with `init_lora_weights: {start}`"
    else:
        return
    raise ConfigurationError(
        f"Got `quantize_student: {args.quantize_student}` with the adapter {told}, which reads or changes the weights "
        "that are rounded; expected plain LoRA, which adds to what they compute."
    )


def refuse_sharded(args: Any, accelerator: Any) -> None:
    """Refuse launches in which no process holds the whole student in float32.

    Raises:
        ConfigurationError: DeepSpeed or FSDP.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if args.quantize_student is not None and kind in ("DEEPSPEED", "FSDP"):
        raise ConfigurationError(
            f"Got `quantize_student: {args.quantize_student}` under {kind}; expected one process or DDP, where each "
            "holds all weights in float32. Launch with `accelerate_configs/ddp.yaml`."
        )
