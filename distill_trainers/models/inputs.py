"""What of a batch goes into a model's forward, and whether the model keeps packed rows apart.

A batch whose rows are packed has no `attention_mask`: its `position_ids` `[B, T]` start anew where a row begins, and
padding is a row of its own. transformers makes the masks of its attentions from that (sdpa, eager, flex), or the
sequence lengths of its kernels (flash).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import ConfigurationError
from ..losses.reduction import widest
from .adapters import causal_lm_of

# Never taken from a batch: named otherwise, made by this package, or of generation.
_OTHERS = frozenset(
    "self input_ids attention_mask labels num_items_in_batch inputs_embeds past_key_values cache_params cache_position "
    "use_cache output_attentions output_hidden_states output_router_logits return_dict logits_to_keep "
    "encoder_outputs decoder_input_ids decoder_attention_mask decoder_inputs_embeds".split()
)
_PROBE_TOKENS = 16


@functools.cache
def _parameters(kind: type) -> frozenset[str]:
    parameters = inspect.signature(kind.forward).parameters.values()  # type: ignore[attr-defined]
    return frozenset(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)) - _OTHERS


def extra_inputs(model: nn.Module) -> frozenset[str]:
    """Name what a model's forward takes of a batch beside ids and mask, such as `position_ids`."""
    kind: Any = type(causal_lm_of(model))
    return _parameters(kind)


def forward_inputs(batch: Mapping[str, Any], extras: Collection[str] = ()) -> dict[str, Tensor]:
    """Select what of a batch a model's forward takes; with `encoder_ids`, `input_ids` are the decoder's.

    Masked ids become 0, which every model knows: the padding token may be known to the student's tokenizer alone.

    Args:
        extras: entries that are passed on where the batch has them.
    """
    if "encoder_ids" not in batch:
        names = {name: name for name in ("input_ids", "attention_mask", *sorted(extras)) if name in batch}
    else:
        names = {"input_ids": "encoder_ids", "attention_mask": "encoder_mask"}
        names |= {"decoder_input_ids": "input_ids", "decoder_attention_mask": "attention_mask"}
    inputs = {name: batch[entry] for name, entry in names.items()}
    for ids in ("input_ids", "decoder_input_ids"):
        mask = inputs.get(ids.replace("input_ids", "attention_mask"))
        if ids in inputs and mask is not None:
            inputs[ids] = inputs[ids].masked_fill(mask == 0, 0)
    return inputs


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Tell whether `position_ids`, and no mask, say where the rows of a batch begin."""
    return "position_ids" in batch and "attention_mask" not in batch


def refuse_extras(model: nn.Module, inputs: Mapping[str, Tensor], who: str) -> None:
    """Refuse entries that the model's forward does not take."""
    takes = extra_inputs(model)
    # An encoder-decoder's inputs are made by `forward_inputs`.
    foreign = sorted(inputs.keys() - takes - _OTHERS)
    if foreign:
        raise ConfigurationError(
            f"Got batches with {foreign}; expected only what {who} takes: {type(causal_lm_of(model)).__name__}.forward "
            f"has no such argument, and without it {who} would read other text than the data says. Leave {foreign[0]} "
            "out of the batches (`packing: false`, or another `data_collator`), or take another model."
        )


def for_kernels(causal_lm: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a forward over packed rows runs on: flash kernels find rows in a batch of one only."""
    inputs = dict(inputs)
    if is_packed(inputs) and "flash" in str(getattr(causal_lm.config, "_attn_implementation", "")):
        shape = inputs["input_ids"].shape
        same = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == shape}
        inputs |= {name: inputs[name].reshape(1, -1) for name in same}
    return inputs


def output_of(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Any:
    """Return the output of the model's own forward, with logits `[B, T, V]` of all positions.

    No cache is made: nobody reads it, and transformers would take packed rows for one text that goes on.
    """
    causal_lm = causal_lm_of(model)
    accepted = inspect.signature(type(causal_lm).forward).parameters
    no_cache = {"use_cache": False} if "use_cache" in accepted else {}
    output = model(**for_kernels(causal_lm, inputs), **options, **no_cache)
    ids = inputs.get("decoder_input_ids", inputs["input_ids"])
    if output.logits.shape[:2] != ids.shape:
        output.logits = output.logits.reshape(*ids.shape, -1)
    return output


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep `model` in eval mode within it; afterwards each module is in the mode that it had.

    DeepSpeed's engine says that it trains whatever its model does: who asked it would put an evaluated model back into
    training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def check_rows_stay_apart(model: nn.Module, device: torch.device, who: str) -> None:
    """Compare a packed row's logits with its own, once: what a model does with `position_ids` only it knows.

    Runs `model` (wrapped or not) three times on a few tokens. Collective under ZeRO-3 and FSDP.

    Raises:
        ConfigurationError: the rows see each other.
    """
    causal_lm = causal_lm_of(model)
    if "position_ids" in extra_inputs(model):
        ids = torch.arange(_PROBE_TOKENS, device=device)[None] % causal_lm.config.get_text_config().vocab_size
        half = _PROBE_TOKENS // 2
        positions = torch.arange(half, device=device).repeat(2)[None]
        alone = ids[:, half:]
        with evaluating(model):
            packed = _logits(model, {"input_ids": ids, "position_ids": positions})[:, half:]
            joined = _logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, half:]
            expected = _logits(model, {"input_ids": alone, "attention_mask": torch.ones_like(alone)})
        error, seen = (packed - expected).norm(), (joined - expected).norm()
        # As far off as if the rows were one text, or half of it: rounding stays far below.
        if error <= 1e-4 * expected.norm() or error < 0.5 * seen:
            return
    raise ConfigurationError(
        f"Got packed rows (`packing: true`, or a data collator whose `position_ids` start anew in a row), but {who} "
        f"({type(causal_lm).__name__}, attention {getattr(causal_lm.config, '_attn_implementation', None)!r}) does not "
        "keep them apart: a row's logits change with the row before it. Set `packing: false`, or take an attention "
        "that reads `position_ids` (`model_init_kwargs: {attn_implementation: sdpa}`)."
    )


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return widest(output_of(model, inputs).logits)
