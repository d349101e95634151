"""One micro-batch through both models: the teacher's signal, the student's wrapper, and the loss inside its head."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import models
from ..losses.fused_linear import fused_linear_terms
from ..losses.fused_logps import fused_row_terms, row_terms_of_logits, signal_token_logps
from ..losses.reduction import trained_mask
from ..signals import TokenLogits
from ..teachers import Teacher

if TYPE_CHECKING:
    from .base import DistillTrainer

logger = logging.getLogger(__name__)


def terms_of_batch(
    trainer: DistillTrainer,
    model: nn.Module,
    inputs: dict[str, Any],
    terms_fn: Any,
    weights: Mapping[str, Any],
    *,
    fused: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the terms of one micro-batch, and the terms `[N]` of its trained tokens by name.

    Args:
        model: the student in its wrappers; all that needs its weights runs inside their forward.
        terms_fn: see `fused_linear_terms`.
        weights: of the terms that make up the total.
        fused: whether the head's product may be taken chunk by chunk.
    """
    labels, predicts = inputs["labels"], trained_mask(inputs["labels"])
    forward_inputs = models.forward_inputs(inputs)
    signal = trainer.teacher_signal(inputs, predicts)
    tokens = {"labels": labels[:, 1:][predicts]}
    tokens |= {k: v[:, 1:][predicts] for k, v in inputs.items() if k.startswith("token_")}
    row_fn = functools.partial(trainer.row_terms, num_rows=len(labels)) if trainer.has_row_terms else None
    if row_fn is not None:
        tokens["row"] = predicts.nonzero()[:, 0]

    with contextlib.nullcontext() if signal is None else trainer.teacher.whole_head(signal) as signal:
        if fused:
            budget = trainer.args.loss_chunk_bytes

            def on_hidden(hidden: Tensor, head: Any) -> tuple[Tensor, dict[str, Tensor]]:
                rows, head = hidden[:, :-1][predicts], head.cut_to(trainer.vocab_size)
                if row_fn is None:
                    return fused_linear_terms(rows, head, signal, terms_fn, tokens, weights, chunk_bytes=budget)
                return fused_row_terms(rows, head, signal, terms_fn, row_fn, tokens, weights, chunk_bytes=budget)

            return model(**forward_inputs, on_hidden=on_hidden)
        logits = model(**forward_inputs).logits[:, :-1][predicts][:, : trainer.vocab_size].float()
        if row_fn is not None:
            return row_terms_of_logits(logits, signal, terms_fn, row_fn, tokens, weights)
        terms = terms_fn(TokenLogits(logits), None if signal is None else signal.chunk(slice(None)), tokens)
        total = sum((w * terms[name].sum() for name, w in weights.items()), start=logits.sum() * 0.0)
        return total, {name: value.detach() for name, value in terms.items()}


@torch.no_grad()
def frozen_logps(trainer: DistillTrainer, teacher: Teacher, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
    """A frozen model's log-probabilities `[N]` of the trained tokens of a batch, and the signal they come from."""
    predicts = trained_mask(batch["labels"])
    labels = batch["labels"][:, 1:][predicts]
    with trainer.compute_loss_context_manager():
        signal = teacher.signal(models.forward_inputs(batch), predicts, trainer.vocab_size)
        with teacher.whole_head(signal) as whole:
            return signal_token_logps(whole, labels, chunk_bytes=trainer.args.loss_chunk_bytes), signal


def ask_ahead(trainer: DistillTrainer, batches: Sequence[Mapping[str, Any]]) -> None:
    """Tell a teacher that answers from afar what it is going to be asked, so that it works while the student does."""
    with trainer.teacher.asking_ahead() as useful:
        for batch in batches if useful else ():
            trainer.teacher_signal(dict(batch), trained_mask(batch["labels"]))


def head_can_be_fused(student: nn.Module, wrapped: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the student's logits can be had from its hidden states; a warning says so if not."""
    if models.head_is_fusable(student) and models.head_reproduces_logits(wrapped, inputs):
        return True
    logger.warning(
        "The output head of %s cannot be fused with the loss (an adapter with dropout on it, or changes to its "
        "logits that are not known here): the loss is exact but holds the logits of every trained token.",
        type(models.causal_lm_of(student)).__name__,
    )
    return False
