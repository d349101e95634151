"""A model's answers to a few made-up tokens: whether they are those of a causal LM, and whether they stay the same.

Shapes: T tokens, V ids.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..exceptions import ConfigurationError
from .adapters import causal_lm_of, unwrapped
from .compiling import uncompiled
from .inputs import output_of
from .loading import decoder_start
from .positions import positions_of
from .whole import named_few

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# How far logits may move with what comes after their token, as a share of how far those of later tokens move. Causal
# models of all architectures of transformers keep to 0 on a CPU; what is not causal moves by a third and more.
_ROUNDING, _COARSE_ROUNDING = 1e-4, 0.05  # the latter of halves, and of weights in 4 or 8 bits


@torch.no_grad()
def check_answers(model: nn.Module, who: str) -> None:
    """Refuse a model that is not causal, or says NaN; once for each, by two forwards of a row of 16 tokens.

    No files tell either: an encoder loads as a causal LM. Changing the second half of the row must not move the logits
    of the first. Modes and the run's random numbers stay as they are. Collective under ZeRO-3 and FSDP2.

    Args:
        model: a causal LM or encoder-decoder (whose decoder is looked at), in its wrappers or not.
        who: it is, for messages: "The student".

    Raises:
        ConfigurationError: what it does, and with which weights.
    """
    causal_lm: Any = causal_lm_of(model)
    if causal_lm.__dict__.get("_distill_answers_well"):
        return
    causal_lm._distill_answers_well = True  # one that cannot run is not asked again
    first, second = _rows_with_equal_starts(causal_lm)
    try:
        before, after = (_row_logits(model, inputs) for inputs in (first, second))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # remote code raises what it likes
        logger.warning(
            "%s (%s) does not run on a few tokens, so whether it is causal is not known: %s: %s",
            who,
            type(causal_lm).__name__,
            type(error).__name__,
            error,
        )
        return
    try:
        what = f"{who} ({type(causal_lm).__name__})"
        _refuse_not_numbers(causal_lm, what, before, after)
        _refuse_acausal(what, before, after, _COARSE_ROUNDING if _is_coarse(model) else _ROUNDING)
    except ConfigurationError:
        causal_lm._distill_answers_well = False
        raise


def _rows_with_equal_starts(causal_lm: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inputs, room = probe(causal_lm), positions_of(causal_lm.config) or 16
    first = {name: value[:1, :room] for name, value in inputs.items()}
    tokens = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    half = first[tokens].shape[1] // 2
    changed = torch.cat([first[tokens][:, :half], inputs[tokens][1:, half:room]], dim=1)
    return first, {**first, tokens: changed}


def _row_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return logits `[T, V]` in float64; by the model itself, without its wrappers, unless it answers through them."""
    causal_lm: Any = causal_lm_of(model)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))  # others are fetched
    inputs = {name: value.to(device) for name, value in inputs.items()}
    asked = model if _is_sharded(causal_lm) else causal_lm
    with contextlib.ExitStack() as stack:
        # A model that draws (Reformer's hashes) draws the same for both rows, and the run's own numbers stay.
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        for context in (evaluating(model), uncompiled(), _exact_float32()):
            stack.enter_context(context)
        return output_of(asked, inputs).logits[0].cpu().double()


def _is_sharded(causal_lm: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    partitioned = any(hasattr(parameter, "ds_id") for parameter in causal_lm.parameters())
    return partitioned or any(isinstance(module, FSDPModule) for module in causal_lm.modules())


def _is_coarse(model: nn.Module) -> bool:
    """Tell whether it multiplies in less than float32: then its kernels may round a token by the tokens beside it."""
    halves = any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters())
    around = (model, unwrapped(model), causal_lm_of(model))
    return halves or any("_original_forward" in each.__dict__ for each in around)  # accelerate's autocast


def _refuse_acausal(what: str, before: Tensor, after: Tensor, limit: float) -> None:
    half = len(before) // 2
    moved = (before - after).nan_to_num(0.0, 0.0, 0.0)  # ids that are masked have -inf in both
    if moved[:half].norm() <= limit * moved[half:].norm():
        return
    raise ConfigurationError(
        f"{what} is not causal: what it says after {half} tokens changes with the tokens that follow, so it would read "
        "the answers off its input. Expected a causal language model; an encoder (BERT and its relatives) is one only "
        "if it was trained with `is_decoder: true` in its config."
    )


def _refuse_not_numbers(causal_lm: Any, what: str, *answers: Tensor) -> None:
    if not any(bool((logits.isnan() | (logits == float("inf"))).any()) for logits in answers):
        return
    tensors = [*causal_lm.named_parameters(), *causal_lm.named_buffers()]
    broken = [n for n, t in tensors if t.is_floating_point() and not t.is_meta and not bool(t.isfinite().all())]
    if _is_sharded(causal_lm):  # all processes say the same, whoever holds the weight
        why = "some of its weights hold NaN or infinity, or overflow their dtype. Expected finite ones"
    elif broken:
        why = f"{named_few(broken)} hold NaN or infinity. Expected finite weights: fetch the model again"
    else:
        why = "its weights are finite, so its numbers overflow. Expected a wider dtype: load it in bfloat16 or float32"
    raise ConfigurationError(f"{what} answers with NaN or infinite logits: {why}.")


def probe(causal_lm: PreTrainedModel) -> dict[str, Tensor]:
    """Make inputs that any causal LM or encoder-decoder reads: 2 rows of 16 ids from all over its vocabulary."""
    rows = causal_lm.config.get_text_config().vocab_size
    ids = torch.linspace(0, rows - 1, 32, dtype=torch.float64).long().view(2, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    start = decoder_start(causal_lm.config)
    if start is not None:
        inputs["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    return inputs


@torch.no_grad()
def logits_of(model: Any, inputs: Mapping[str, Tensor], *, sharded: bool = False) -> Tensor:
    """Return a model's logits `[tokens, V]` on the CPU, in at least float32, without dropout.

    Args:
        sharded: it answers only through its wrapper; all processes must call it.
    """
    device = next(model.parameters()).device
    with evaluating(model), uncompiled(), _exact_float32():
        # accelerate puts autocast around the forward of the model that trains, whose rounding is not of its weights.
        forward: Callable[..., Any] = model if sharded else model.__dict__.get("_original_forward", model)
        logits = forward(**{name: value.to(device) for name, value in inputs.items()}).logits
    keep = inputs.get("decoder_attention_mask", None if "decoder_input_ids" in inputs else inputs["attention_mask"])
    logits = logits.flatten(0, 1) if keep is None else logits[keep.to(device).bool()]
    return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """Keep TF32 out within it: a GPU that trains with it (`tf32`, `torch_compile`) rounds what a CPU does not."""
    backends: Any = torch.backends
    new = hasattr(backends, "fp32_precision")  # since torch 2.9, which refuses a mixture of both ways
    name, off = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    places = [backends.cuda.matmul, *([backends.cudnn.conv, backends.cudnn.rnn] if new else [backends.cudnn])]
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, off)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode within it; each part gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
