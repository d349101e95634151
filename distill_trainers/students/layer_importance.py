"""How much each decoder layer matters on some text: what the model says without it, or how much it changes.

Shapes: B rows, T tokens, N measured tokens, D hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..exceptions import ConfigurationError
from ..models import read_head
from .layers import check_count, find_decoder_layers

Batch = Mapping[str, Tensor]
Progress = Callable[[int, int], None]
_Call = tuple[Tensor, Any]  # a layer's input, and its output in the form it gives it: a tensor or a tuple


@torch.no_grad()
def layer_importance(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    measure: str = "kl",
    autocast_dtype: torch.dtype | None = None,
    chunk_size: int = 256,
    progress: Progress | None = None,
) -> list[float]:
    """Measure how much each decoder layer matters on some text; larger is more important.

    Measures:
        "kl": forward KL of the whole model to the model without that one layer, in nats per token. Costs 1 + L/2
            forward passes, as the layers below are not run again, and holds the L layer inputs `[B, T, D]` of a batch.
        "angular": 1 - cosine of a layer's input and output, the Block Influence of ShortGPT (arXiv 2403.03853).
            Costs one forward pass, and does not look at what the change is for.

    Args:
        model: a causal LM; its weights and mode are left as they were.
        batches: dicts with `input_ids [B, T]` and, optionally, `attention_mask` and unshifted `labels` (-100 where not
            measured). Without labels every attended token after the first is measured.
        measure: "kl" or "angular".
        autocast_dtype: run under autocast, e.g. `torch.bfloat16`.
        chunk_size: tokens projected to the vocabulary at a time.
        progress: called as `progress(batches done, layers done in this batch)`.

    Returns:
        L values, a mean over all measured tokens.

    Raises:
        ConfigurationError: unknown measure, or no token to measure.
    """
    if measure not in MEASURES:
        raise ConfigurationError(f"measure={measure!r} is not known; choose one of {', '.join(MEASURES)}.")
    _, layers = find_decoder_layers(model)
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else nullcontext()
    was_training = model.training
    sums, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    model.eval()
    try:
        for done, batch in enumerate(batches):
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
            predicts = predicting_positions(batch).to(device)
            if not predicts.any():
                continue
            tokens += int(predicts.sum())
            with autocast:
                for index, value in enumerate(MEASURES[measure](model, layers, inputs, predicts, chunk_size)):
                    sums[index] += value
                    if progress is not None:
                        progress(done, index + 1)
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ConfigurationError(
            "Layer importance got no token to measure: no batches, or all labels -100. Give it batches with text."
        )
    return (sums / tokens).tolist()


def choose_layers(importance: Sequence[float], keep: int) -> list[int]:
    """Choose the `keep` layers of largest importance, ascending; of equals the lower one is kept."""
    check_count(len(importance), keep)
    by_importance = sorted(range(len(importance)), key=lambda index: (-importance[index], index))
    return sorted(by_importance[:keep])


def predicting_positions(batch: Batch) -> Tensor:
    """`[B, T]`, true where the hidden state predicts a measured token, which is the next one."""
    attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0
    measured = batch["labels"] != -100 if "labels" in batch else attended
    # The first token of a left-padded row has only padding before it: nothing predicts it.
    return F.pad(measured[:, 1:] & attended[:, :-1], (0, 1))


def last_hidden(model: PreTrainedModel, inputs: Batch) -> Tensor:
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def _recorded_pass(model: PreTrainedModel, layers: nn.ModuleList, inputs: Batch) -> tuple[Tensor, list[_Call]]:
    """Last hidden states `[B, T, D]` of the whole model, and each layer's input and output on the way."""
    calls: list[_Call] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args[0] if args else kwargs["hidden_states"], output))

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        return last_hidden(model, inputs), calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _without_layer(layers: nn.ModuleList, index: int, calls: list[_Call]) -> Iterator[None]:
    """Layer `index` hands on its recorded input, and the layers below, whose work that input is, do nothing."""
    hidden, _ = calls[index]
    forwards = [layer.__dict__.get("forward") for layer in layers]  # offloading hooks put a forward of theirs there
    try:
        for layer, (_, output) in zip(layers[: index + 1], calls, strict=False):
            result = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
            layer.forward = lambda *args, _result=result, **kwargs: _result
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _removal_kl(
    model: PreTrainedModel, layers: nn.ModuleList, inputs: Batch, predicts: Tensor, chunk_size: int
) -> Iterator[float]:
    """Summed forward KL to the model without layer 0, 1, ..., over the N measured tokens."""
    hidden, calls = _recorded_pass(model, layers, inputs)
    whole_ND = hidden[predicts]
    for index in range(len(layers)):
        with _without_layer(layers, index, calls):
            pruned_ND = last_hidden(model, inputs)[predicts]
        yield summed_forward_kl(model, whole_ND, model, pruned_ND, chunk_size)


def _block_influence(
    model: PreTrainedModel, layers: nn.ModuleList, inputs: Batch, predicts: Tensor, chunk_size: int
) -> Iterator[float]:
    """Summed 1 - cosine of each layer's input and output over the N measured tokens."""
    _, calls = _recorded_pass(model, layers, inputs)
    for before, output in calls:
        after = output[0] if isinstance(output, tuple) else output
        yield (1 - F.cosine_similarity(before[predicts].float(), after[predicts].float(), dim=-1)).sum().item()


MEASURES: dict[str, Callable[..., Iterator[float]]] = {"kl": _removal_kl, "angular": _block_influence}


def summed_forward_kl(
    teacher: PreTrainedModel, teacher_ND: Tensor, student: PreTrainedModel, student_ND: Tensor, chunk_size: int = 256
) -> float:
    """Sum KL(teacher || student) in nats over N tokens, from last hidden states `[N, D]`, chunk by chunk."""
    teacher_head, student_head = read_head(teacher), read_head(student)
    total = 0.0
    for whole, pruned in zip(teacher_ND.split(chunk_size), student_ND.split(chunk_size), strict=True):
        teacher_logps = teacher_head.logits(whole).float().log_softmax(-1)
        student_logps = student_head.logits(pruned).float().log_softmax(-1)
        total += F.kl_div(student_logps, teacher_logps, reduction="sum", log_target=True).item()
    return total
