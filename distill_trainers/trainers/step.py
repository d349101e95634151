"""One micro-batch through both models: the teacher's signal, the student's wrapper, and the loss inside its head.

Shapes: B rows, T positions, N trained tokens, V ids, D width of hidden states.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..data.other_tokenizer import OtherTokenizer, TeacherTokens
from ..data.views import has_view, teacher_inputs
from ..exceptions import ConfigurationError
from ..losses.aligned import TEACHER_LOGPS, AlignedLoss, Chunks, chunk_entries
from ..losses.fused_linear import TermsFn, fused_linear_terms
from ..losses.fused_logps import fused_row_terms, row_terms_of_logits, signal_token_logps
from ..losses.reduction import trained_mask, weighted_total
from ..losses.sampler_ratio import SamplerRatio
from ..losses.sparse import token_entropy, token_logps
from ..signals import Aligned, TeacherSignal, TokenLogits, TokenLogprobs
from ..teachers import Teacher
from .hidden_states import HIDDEN_MSE, HiddenMatch, States

logger = logging.getLogger(__name__)

SignalFn = Callable[[dict[str, Any], Tensor], TeacherSignal | None]


class TwoModels:
    """Runs teacher and student over a micro-batch; training, evaluation, measures and scoring all go through it.

    Args:
        teacher: see `Teacher`.
        vocab_size: ids from here on are padding and leave the softmax of both; None keeps all.
        chunk_bytes: size of one chunk of logits, see `fused_linear_terms`.
        autocast: makes the context of the run's mixed precision.
        extras: entries of a batch that go to both models beside ids and mask (`models.extra_inputs` of the student).
        other: writes what the teacher reads, if it has a tokenizer of its own.
        alm_temperature: with `other`: see `chunk_entries`; None is the limit.
        hidden: compares hidden states while the student trains; None compares none.

    Attributes:
        sampler_ratio: weighs tokens that another sampler drew; None weighs none.
        aligned_loss: all that training reads of a teacher with a tokenizer of its own; None: it may read more.
        head_is_fused: whether the student's logits are had from its hidden states; the first batch tells.
    """

    def __init__(
        self,
        teacher: Teacher,
        vocab_size: int | None,
        chunk_bytes: int,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        extras: frozenset[str] = frozenset(),
        other: OtherTokenizer | None = None,
        alm_temperature: float | None = None,
        hidden: HiddenMatch | None = None,
    ):
        self.teacher = teacher
        self.vocab_size = vocab_size
        self.chunk_bytes = chunk_bytes
        self.autocast = autocast
        self.extras = extras
        self.other = other
        self.alm_temperature = math.inf if alm_temperature is None else alm_temperature
        self.hidden = hidden
        self.sampler_ratio: SamplerRatio | None = None
        self.aligned_loss: AlignedLoss | None = None
        self.head_is_fused: bool | None = None
        self._rows_stay_apart = False

    def signal(self, inputs: Mapping[str, Any], predicts: Tensor) -> TeacherSignal:
        """Ask the teacher about the tokens that `predicts` `[B, T-1]` marks (`Teacher.signal`), on its own view."""
        return self._asked(self.teacher, self.completed(inputs), predicts)

    def completed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with what a teacher with a tokenizer of its own reads; any other one as it is."""
        return dict(inputs) if self.other is None or not has_view(inputs) else self.other.added_to(inputs)

    def _asked(self, frozen: Teacher, inputs: Mapping[str, Any], predicts: Tensor) -> TeacherSignal:
        """What a frozen model says of the student's tokens, or of its own ones where these are others."""
        told = frozen.signal(*self.read_by(frozen, inputs, predicts), self.vocab_size)
        if told is None or frozen is not self.teacher or self.other is None:
            return told
        theirs = TeacherTokens.of(inputs)
        begins = inputs["token_shared"][:, 1:][predicts] - 1
        places = theirs.places[predicts.nonzero()[:, 0], begins.clamp(min=0)].clamp(min=0)
        return Aligned(told, theirs.ids, theirs.rows, theirs.chunks, places)

    @contextlib.contextmanager
    def _whole(self, frozen: Teacher, signal: TeacherSignal | None) -> Iterator[TeacherSignal | None]:
        """The signal with its head whole: under ZeRO-3 and FSDP2 a process holds a share of it."""
        if signal is None:
            yield None
        elif isinstance(signal, Aligned):
            with frozen.whole_head(signal.told) as told:
                yield replace(signal, told=told)
        else:
            with frozen.whole_head(signal) as whole:
                yield whole

    def read_by(self, frozen: Teacher, inputs: Mapping[str, Any], predicts: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return what of a batch a frozen model reads, and which of its positions predict the trained tokens.

        The teacher has its own view of rows that come with one; any other model, such as the student before training,
        reads what the student reads.

        Raises:
            ConfigurationError: the batch says more about the student's text than its ids.
        """
        if frozen is not self.teacher or not has_view(inputs):
            return models.forward_inputs(inputs, self.extras | frozen.reads), predicts
        more = sorted(self.extras & inputs.keys())
        if more:
            raise ConfigurationError(
                f"Got batches with {more} of the student's text, while the teacher reads another prompt, of which they "
                "say nothing; expected ids and mask. Leave them out of the batches (another `data_collator`)."
            )
        viewed, predicts = teacher_inputs(inputs, predicts)
        also = {name: inputs[name] for name in frozen.reads & inputs.keys()}
        return models.forward_inputs({**viewed, **also}, frozen.reads), predicts

    def ask_ahead(self, batches: Iterable[Mapping[str, Any]], teacher_signal: SignalFn) -> None:
        """Tell a remote teacher what it is going to be asked, so that it works while the student does.

        Args:
            teacher_signal: what will ask it, with the same batches.
        """
        with self.teacher.asking_ahead() as is_useful:
            for batch in batches if is_useful else ():
                teacher_signal(dict(batch), trained_mask(batch["labels"]))

    def terms(
        self,
        student: nn.Module,
        inputs: Mapping[str, Any],
        teacher_signal: SignalFn | None,
        terms_fn: TermsFn,
        weights: Mapping[str, Any],
        row_terms: Callable[..., Mapping[str, Tensor]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of a micro-batch's terms, and the terms `[N]` of its trained tokens by name.

        While a mixture of experts trains whose config asks for it, its balance term is among them: `aux_loss`, a scalar
        with its graph, which is not in the sum.

        Args:
            student: in its wrappers; all that needs its weights runs inside their forward.
            inputs: a batch with `labels` `[B, T]`; `terms_fn` gets its entries `token_*` too.
            teacher_signal: asks the teacher about the N tokens; None asks nobody.
            terms_fn: see `fused_linear_terms`.
            weights: of the terms that make up the total.
            row_terms: see `DistillTrainer.row_terms`.
        """
        inputs = self.completed(inputs)
        labels, predicts = inputs["labels"], trained_mask(inputs["labels"])
        tokens = {"labels": labels[:, 1:][predicts]}
        tokens |= {k: v[:, 1:][predicts] for k, v in inputs.items() if k.startswith("token_")}
        if row_terms is not None or self.other is not None:
            tokens["row"] = predicts.nonzero()[:, 0]
        if row_terms is not None:
            row_terms = functools.partial(row_terms, num_rows=len(labels))
        forward_inputs = models.forward_inputs(inputs, self.extras)
        trains = student.training and torch.is_grad_enabled()
        if trains and self.teacher.is_the_student and teacher_signal is not None:
            terms_fn = _with_entropy(terms_fn)
        balanced = trains and models.balance_coefficient(student) > 0
        if self.head_is_fused is None:
            # Before the teacher is asked: ZeRO-3 keeps the order in which the first forward meets the weights, and a
            # teacher that is the student without its adapter would meet too few of them.
            models.check_answers(student, "The student")
            self.head_is_fused = _head_can_be_fused(student, forward_inputs)
        if models.is_packed(inputs) and row_terms is not None:
            raise ConfigurationError(
                "Got packed rows with a method that has terms of whole rows (`row_terms`); expected rows of their own. "
                "Set `packing: false`, or leave `data_collator` out."
            )
        if models.is_packed(inputs) and not self._rows_stay_apart:
            models.check_rows_stay_apart(student, labels.device, "the student")
            self._rows_stay_apart = True
        hidden = self.hidden if trains and teacher_signal is not None else None
        with self._teacher_states(hidden, inputs, predicts) as theirs:
            signal = None if teacher_signal is None else teacher_signal(dict(inputs), predicts)

        def matched(total: Tensor, terms: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            if hidden is None:
                return total, terms
            errors = hidden.term(ours, theirs)
            return total + hidden.weight * errors.sum(), {**terms, HIDDEN_MSE: errors.detach()}

        def on_hidden(hidden_BTD: Tensor, head: Any) -> tuple[Tensor, dict[str, Tensor]]:
            hidden_ND, head = hidden_BTD[:, :-1][predicts], head.cut_to(self.vocab_size)

            def terms_of(terms: TermsFn) -> Mapping[str, Tensor]:
                return fused_linear_terms(hidden_ND, head, None, terms, tokens, {}, chunk_bytes=self.chunk_bytes)[1]

            known = self._known(tokens, predicts, whole_signal, terms_of)
            operands = hidden_ND, head, _read_at_tokens(whole_signal, row_terms, known), terms_fn
            if row_terms is None:
                return matched(*fused_linear_terms(*operands, known, weights, chunk_bytes=self.chunk_bytes))
            return matched(*fused_row_terms(*operands, row_terms, known, weights, chunk_bytes=self.chunk_bytes))

        watching = contextlib.nullcontext({}) if hidden is None else hidden.of_student(student, predicts)
        with self._whole(self.teacher, signal) as whole_signal, watching as ours:
            if trains and self.aligned_loss is not None and isinstance(whole_signal, Aligned):
                whole_signal = self.aligned_loss.told(whole_signal, self.chunk_bytes)
            if self.head_is_fused:
                # The student's head is whole inside its own forward alone, where the wrappers see the loss as well.
                result = student(**forward_inputs, on_hidden=on_hidden, **({"with_balance": True} if balanced else {}))
                (total, terms), balance = result if balanced else (result, None)
            else:
                asked = {"output_router_logits": True} if balanced else {}
                output = models.output_of(student, forward_inputs, **asked)
                logits_NV = output.logits[:, :-1][predicts][:, : self.vocab_size].float()
                of_logits = lambda terms: terms(TokenLogits(logits_NV), None, tokens)  # noqa: E731
                known = self._known(tokens, predicts, whole_signal, of_logits)
                told = _read_at_tokens(whole_signal, row_terms, known)
                total, terms = matched(*_terms_of_logits(logits_NV, told, terms_fn, row_terms, known, weights))
                balance = getattr(output, models.AUX_LOSS, None) if balanced else None
        return total, terms if balance is None else {**terms, models.AUX_LOSS: balance}

    def _teacher_states(
        self, hidden: HiddenMatch | None, inputs: Mapping[str, Any], predicts: Tensor
    ) -> contextlib.AbstractContextManager[States]:
        if hidden is None:
            return contextlib.nullcontext({})
        return hidden.of_teacher(self.teacher, self.read_by(self.teacher, inputs, predicts)[1])

    def _known(
        self,
        tokens: dict[str, Tensor],
        predicts: Tensor,
        signal: TeacherSignal | None,
        terms_of: Callable[[TermsFn], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Add what goes by other tokens than one alone, so that all are seen once ahead of the loss."""
        tokens = self._weighed(tokens, predicts, terms_of)
        if not isinstance(signal, Aligned):
            return tokens
        with torch.no_grad(), torch.autocast(predicts.device.type, enabled=False):
            logps = terms_of(lambda student, _, chunk: {"logps": token_logps(student, chunk["labels"])})["logps"]
            theirs = signal_token_logps(signal.told, signal.ids, chunk_bytes=self.chunk_bytes)
            chunks = _chunks(tokens["token_chunk"], signal, predicts)
            return tokens | chunk_entries(chunks, logps, theirs, tokens["token_comparable"], self.alm_temperature)

    def _weighed(
        self, tokens: dict[str, Tensor], predicts: Tensor, terms_of: Callable[[TermsFn], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Add weights of sampled tokens. They go by the tokens before, so all are seen once ahead of the loss."""
        if self.sampler_ratio is None or not self.sampler_ratio.weighs(tokens):
            return tokens
        with torch.no_grad():
            return {**tokens, **self.sampler_ratio.weights(terms_of(self.sampler_ratio.terms), tokens, predicts)}

    @torch.no_grad()
    def frozen_logps(self, frozen: Teacher, batch: Mapping[str, Tensor]) -> tuple[Tensor, TeacherSignal]:
        """Return a frozen model's log-probabilities `[N]` of a batch's trained tokens, and the signal behind them."""
        predicts, batch = trained_mask(batch["labels"]), self.completed(batch)
        labels = batch["labels"][:, 1:][predicts]
        with self.autocast():
            signal = self._asked(frozen, batch, predicts)
            with self._whole(frozen, signal) as whole_signal:
                assert whole_signal is not None
                if isinstance(whole_signal, Aligned):
                    theirs = signal_token_logps(whole_signal.told, whole_signal.ids, chunk_bytes=self.chunk_bytes)
                    chunks = _chunks(batch["token_chunk"][:, 1:][predicts], whole_signal, predicts)
                    return chunks.teacher_at_tokens(theirs), signal
                return signal_token_logps(whole_signal, labels, chunk_bytes=self.chunk_bytes), signal


def _chunks(numbers: Tensor, signal: Aligned, predicts: Tensor) -> Chunks:
    """The chunks of a batch: a row has no more of them than tokens."""
    return Chunks(predicts.nonzero()[:, 0], numbers, signal, (len(predicts), predicts.shape[1] + 2))


def _read_at_tokens(signal: TeacherSignal | None, row_terms: Any, tokens: Mapping[str, Tensor]) -> TeacherSignal | None:
    """What a loss of whole rows reads of a teacher with other tokens: where they stand in a row is of no matter."""
    if row_terms is None or not isinstance(signal, Aligned):
        return signal
    return TokenLogprobs(tokens[TEACHER_LOGPS])


def _with_entropy(terms_fn: TermsFn) -> TermsFn:
    """The same terms, and the student's `entropy` at temperature 1 in nats: it falls when a self-teacher collapses."""

    def with_entropy(student: TokenLogits, teacher: Any, tokens: Any) -> Mapping[str, Tensor]:
        terms = terms_fn(student, teacher, tokens)
        return terms if "entropy" in terms else {**terms, "entropy": token_entropy(student)}

    return with_entropy


def _terms_of_logits(
    logits_NV: Tensor,
    teacher: TeacherSignal | None,
    terms_fn: TermsFn,
    row_terms: Callable[..., Mapping[str, Tensor]] | None,
    tokens: dict[str, Tensor],
    weights: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Do what the fused losses do, with the logits of all tokens at hand."""
    if row_terms is not None:
        return row_terms_of_logits(logits_NV, teacher, terms_fn, row_terms, tokens, weights)
    told = None if teacher is None else teacher.chunk(slice(None))
    terms = terms_fn(TokenLogits(logits_NV), told, tokens)
    # Without a token the total must be part of the graph still: backward is collective.
    total = weighted_total(terms, weights, start=logits_NV.sum() * 0.0)
    return total, {name: values.detach() for name, values in terms.items()}


def _head_can_be_fused(student: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the student's logits can be had from its hidden states; a warning says so if not."""
    if models.head_is_fusable(student) and models.head_reproduces_logits(student, inputs):
        return True
    logger.warning(
        "The output head of %s cannot be fused with the loss (an adapter with dropout on it, or changes to its "
        "logits that are not known here): the loss is exact but holds the logits of every trained token.",
        type(models.causal_lm_of(student)).__name__,
    )
    return False
