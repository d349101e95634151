"""Evaluation on given tokens: whatever a method measures, as means over a whole set, comparable between steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .. import models
from ..data.packing import unpacked
from ..data.routing import TEACHER_INDEX
from ..data.token_bytes import TokenBytes
from ..evaluation.agreement import AGREEMENT_TERMS, agreement_metrics
from ..exceptions import ConfigurationError, DatasetError
from ..losses.reduction import count_trained_tokens, means_of_sums, sum_per_example, token_mean, trained_mask
from ..signals import TokenLogits
from .lifecycle.held_out import HeldOutMeasures
from .protocol import Batch

logger = logging.getLogger(__name__)


class TeacherForcedEvaluation(Trainer):
    """The evaluation of `DistillTrainer`, which has all that is asked of `self` here."""

    _told_replaced: frozenset[str] = frozenset()  # measures that `compute_metrics` was said to replace

    if TYPE_CHECKING:
        args: Any
        last_eval_metrics: dict[str, float]
        distill_terms: Any
        agreement_terms: Any
        token_terms: Any
        two_models: Any
        teacher: Any
        _eval_rows: list[Tensor] | None
        _eval_owners: list[Tensor]
        _eval_names: list[str]

        @property
        def loss_weights(self) -> dict[str, float]: ...

        @property
        def loss_divisors(self) -> dict[str, str]: ...

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measure loss, perplexity, KL to the teacher, top-1 agreement, teacher-forced: means over all tokens.

        A measure that `compute_metrics` returns takes the place of one of that name; but the loss stays the method's.
        """
        self._eval_rows, self._eval_owners = [], []
        with models.rounding_once(self.model):  # type: ignore[arg-type]  # there is one
            told = description, prediction_loss_only, ignore_keys, metric_key_prefix
            output = super().evaluation_loop(dataloader, *told)
        if not self._eval_rows:
            raise DatasetError(f"The {description.lower()} set has no batches; got an empty dataset.")
        rows, owners = torch.cat(self._eval_rows).double(), torch.cat(self._eval_owners)
        self._eval_rows = None
        metrics = self._scores_of(rows)
        if metrics["tokens"] == 0:
            raise DatasetError(
                f"The {description.lower()} set has no tokens to score: no row has a completion that fits into "
                f"max_length ({self.args.max_length}). Give its rows completions, or raise max_length."
            )
        for k, name in enumerate(self.teacher.names):
            own = self._scores_of(rows[owners == k])
            metrics |= {f"{score}/{name}": value for score, value in own.items() if own["tokens"]}
        given = {k: v for k, v in (output.metrics or {}).items() if k != f"{metric_key_prefix}_loss"}
        scores = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self._tell_replaced(given.keys() & scores.keys())
        scores |= given
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, HeldOutMeasures) and description != "Prediction":  # its rows are evaluation's
                stem = metric_key_prefix.partition("_")[0]  # not that of one of several evaluation sets
                scores = {f"{stem}_{name}": value for name, value in callback.take(dataloader.dataset).items()} | scores
        self.last_eval_metrics.update(scores)
        return output._replace(metrics=scores)

    def _scores_of(self, rows: Tensor) -> dict[str, float]:
        """What the sums `[E, terms]` of some examples come to."""
        sums = dict(zip(self._eval_names, rows.sum(0).tolist(), strict=True))
        tokens = sums.pop("tokens")
        means = means_of_sums(sums, tokens, self.loss_divisors)
        scores = {"loss": sum(w * means[name] for name, w in self.loss_weights.items())}
        scores |= {name: value for name, value in means.items() if name not in AGREEMENT_TERMS}
        return scores | agreement_metrics(means) | {"tokens": tokens}

    def _tell_replaced(self, names: set[str]) -> None:
        new = names - self._told_replaced
        if new:
            logger.warning("`compute_metrics` returns %s, which takes the place of our own.", ", ".join(sorted(new)))
        self._told_replaced |= names

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Sum up by example, so that those which pad the last distributed batch can be dropped again.

        Returns:
            the loss and, unless it is all that is asked for, the student's logits `[B, T, V]` and labels `[B, T]`,
            unshifted: `logits[:, t]` predicts `labels[:, t + 1]`. Where an example has two rows (pairs, rationales), it
            is the first: the chosen response, the answer, the right chain.
        """

        def terms_fn(student: TokenLogits, teacher: TokenLogits, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {**self.distill_terms(student, teacher, tokens), **self.agreement_terms(student, teacher, tokens)}

        inputs = self._with_bytes(unpacked(self._prepare_inputs(inputs)))  # an example is a row
        with self.compute_loss_context_manager():
            total, terms = self.token_terms(model, inputs, terms_fn, self.loss_weights)
        predicts = trained_mask(inputs["labels"])
        entries = sorted(set(self.loss_divisors.values()) & inputs.keys())  # in one order on all processes
        terms |= {f"/{entry}": inputs[entry][:, 1:][predicts] for entry in entries}
        terms.setdefault("tokens", torch.ones_like(terms["nll"]))
        sums = torch.stack([sum_per_example(values.float(), inputs) for values in terms.values()], dim=1)
        if self._eval_rows is not None:
            self._eval_names = list(terms)
            owners = inputs.get(TEACHER_INDEX, torch.zeros(len(sums), dtype=torch.long, device=sums.device))
            self._eval_rows.append(self.accelerator.gather_for_metrics(sums).cpu())
            self._eval_owners.append(self.accelerator.gather_for_metrics(owners).cpu())
        loss = token_mean(total, count_trained_tokens([inputs]).to(total.device))
        return (loss, None, None) if prediction_loss_only else (loss, *self._logits(model, inputs))

    def _with_bytes(self, inputs: Batch) -> Batch:
        """Add how many bytes of text each label stands for, unless a batch tells it or `nll` is over a part of them."""
        if "token_bytes" in inputs or "nll" in self.loss_divisors:
            return inputs
        spelled = TokenBytes.of_readable(self.processing_class)
        if spelled is None:
            return inputs
        labels, sizes = inputs["labels"], spelled.num_bytes.to(inputs["labels"].device)
        known = (labels >= 0) & (labels < len(sizes))
        return {**inputs, "token_bytes": sizes[labels.where(known, 0)].where(known, 0)}

    def _logits(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
        """The student's logits and labels, of one row for each example."""
        labels, examples = inputs["labels"], inputs.get("examples")
        if examples is not None and "inputs" in self.args.include_for_metrics:
            raise ConfigurationError(
                "Got `include_for_metrics: [inputs]` with a method whose examples have two rows, so that inputs and "
                "predictions would not lie side by side; expected it without `inputs`. Leave it out."
            )
        with self.compute_loss_context_manager():
            logits = models.output_of(model, models.forward_inputs(inputs, self.two_models.extras)).logits
        if examples is None:
            return logits, labels
        order = examples.tolist()
        first = torch.tensor([order.index(k) for k in range(max(order) + 1)], device=labels.device)
        return logits[first], labels[first]
