"""The one training path that every distillation method shares.

One optimiser step:

    collated batches of the whole accumulation window
      -> rollout(batches)   some get new completions
      -> score(batches)     per-token weights, rewards, advantages
      -> count what the terms are divided by, once, over all micro-batches and processes
      -> per micro-batch: teacher signal, student forward through its wrapper, distill_terms
      -> sum / count -> backward

A method overrides `rollout`, `score` and `distill_terms`; none of them owns a loop.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from .. import hub, models
from ..data import DistillCollator
from ..data.foreign import fitted, with_ids
from ..evaluation.agreement import agreement_terms
from ..exceptions import ConfigurationError, DatasetError
from ..losses.aligned import TEACHER_LOGPS
from ..losses.reduction import step_counts, step_weights, token_mean, window_mean
from ..rollouts import build_engine
from ..signals import TeacherSignal, TokenLogits, TokenLogprobs
from ..teachers import Teacher
from ..teachers.base import Pair
from ..teachers.loading import load_teacher
from .aligned import aligned_loss
from .config import DistillConfig, config_from_arguments
from .dataloaders import Dataloaders
from .evaluation_loop import TeacherForcedEvaluation
from .given import arguments
from .given.own_teacher import warn_of_nothing_new
from .given.quantized import check_adapter, group_size_of, refuse_sharded
from .given.token_batches import refuse_uneven_sampling
from .hidden_states import hidden_match
from .lifecycle import outage, publishing
from .lifecycle.callbacks import StepLoss, TeacherKeeper, TrlNames
from .lifecycle.checkpoints import Resuming
from .lifecycle.completions import sampling_settings
from .lifecycle.fresh import FreshStudents
from .lifecycle.held_out import HeldOutMeasures
from .lifecycle.metrics import RunningMetrics
from .lifecycle.order import check_first_window
from .lifecycle.proof import Proof
from .lifecycle.recording import RunRecorder
from .lifecycle.sentinel import Sentinel
from .preflight import Given, preflight
from .protocol import Batch
from .sampling import Sampling
from .step import TwoModels
from .student import load_student


class DistillTrainer(publishing.Publishing, Resuming, FreshStudents, Dataloaders, Sampling, TeacherForcedEvaluation):
    """Base of all distillation trainers; use a method's own trainer.

    Args:
        model: the student: a folder or Hub id, a `PreTrainedModel`, or a `PeftModel`.
        teacher_model: the teacher: a folder, a Hub id, a model or a `Teacher`; or several by name; None for none.
        args: the method's config; None takes its defaults, plain `TrainingArguments` are carried over.
        train_dataset: rows of any layout that `distill_trainers.data.formats` names; may be iterable.
        eval_dataset: likewise, or a dict of several. Evaluation is teacher-forced, so it compares between steps.
        processing_class: the student's tokenizer; None loads the one saved beside the student.
        data_collator: of yours, of transformers or TRL: see `ForeignCollator` for what it must give.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: wraps the student with a new adapter.
        quantization_config: for a student given by name.
        teacher_processing_class: the teacher's tokenizer, only to check that both agree; None loads it by name.
        formatting_func: writes a text, or a whole row, of each row of the datasets; of a batch, a list of texts.
        model_init: in place of `model`, makes a student anew for each `train`; `hyperparameter_search` needs it.
        compute_metrics, preprocess_logits_for_metrics: as in `transformers.Trainer`; they alone make evaluation hold
            logits `[B, T, V]` (see `prediction_step`).
        optimizer_cls_and_kwargs: an optimizer's class and its arguments, in place of the setting `optim`.
        unknown: any other argument is refused by name, with what to write instead.

    Raises:
        ConfigurationError, DatasetError, VocabularyError: before any model is loaded where that is possible.
    """

    args: DistillConfig
    model: nn.Module
    processing_class: PreTrainedTokenizerBase
    eval_dataset: Any

    config_class: ClassVar[type[DistillConfig]] = DistillConfig
    method_name: ClassVar[str] = "distillation"
    paper: ClassVar[dict[str, str]] = {}
    has_row_terms: ClassVar[bool] = False  # whether `row_terms` is there to be called
    logged_divisors: ClassVar[dict[str, str]] = {}  # as `loss_divisors`: of terms that some batches log, by their entry
    pretraining_dataset: Any = None  # of methods with a loss on plain text
    loss_is_scaled_for_ga = True  # token_mean divides by the tokens of the whole accumulation window

    @arguments.checked
    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel | nn.Module | None = None,
        teacher_model: str | PathLike[str] | PreTrainedModel | nn.Module | Teacher | Mapping[str, Any] | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | Sequence[Mapping[str, Any]] | None = None,
        eval_dataset: Dataset | IterableDataset | Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        model_init: Callable[..., PreTrainedModel | str] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        **unknown: Any,
    ):
        self.args = self.configured(config_from_arguments(self.config_class, args))
        self.adapter, self.quantization = peft_config, quantization_config
        self.formatting_func, self.model_init = formatting_func, model_init  # type: ignore[assignment]  # or a name
        self.compute_metrics = compute_metrics
        source = models.compiled_by_layer(arguments.plain(model)) if model_init is None else self.new_source()
        adapted, teacher = peft_config is not None, models.compiled_by_layer(arguments.plain(teacher_model))
        pair = Pair(source, teacher, adapted, processing_class, teacher_processing_class, model_init is not None)
        student, tokenizer, train_rows, eval_rows = self._load(pair, train_dataset, eval_dataset)
        super().__init__(
            model=student,
            args=self.args,
            data_collator=self._collator(data_collator, student, tokenizer),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            compute_metrics=arguments.checked_metrics(compute_metrics),
            callbacks=list(callbacks or ()),
            optimizers=optimizers or (None, None),
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.model_init = model_init  # type: ignore[assignment]
        self._ready_train = None if self.requirements.replaces_completions else train_rows
        self._refuse_launch()
        models.compile_for_launch(self.model, self.args, self.accelerator)
        self.teacher.prepare(self.accelerator)
        self._start()

    def _load(self, pair: Pair, train_dataset: Any, eval_dataset: Any) -> tuple[nn.Module, Any, Any, Any]:
        """Load both models, and tokenise rows; what can be refused before that is."""
        args, train = self.args, arguments.formatted(train_dataset, self.formatting_func, "train")
        evaluation = arguments.formatted(eval_dataset, self.formatting_func, "eval")
        quantized = self.quantization is not None
        ready = preflight(
            Given(
                pair,
                args,
                train,
                evaluation,
                self.pretraining_dataset,
                quantized,
                own_scores=self.compute_metrics is not None,
            )
        )
        self.requirements, self.student_config, tokenizer = ready.wants, ready.config, ready.pair.tokenizer
        self.data_sources = list(hub.hub_ids_of(train_dataset))  # Hub ids, or files and folders
        train_rows, eval_rows, self.pretraining_dataset = ready.rows()
        if isinstance(train_rows, IterableDataset):
            # Batches of different lengths cannot be split from one process to the others.
            args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]  # parsed by now
        self.teacher_source = pair.teacher
        pair = replace(ready.pair, teacher=ready.open_teacher(train_rows, eval_rows))
        self.model_wrapped = student = self.make_student(pair.student, trains=train_rows is not None)
        if not args.disable_dropout and not models.has_dropout(student):
            warn_of_nothing_new(args, train_rows)
        self.teacher = load_teacher(pair, args, lambda: self.model_wrapped)
        ready.tell(self.teacher, train_rows, eval_rows, loaded=True)
        rows = models.causal_lm_of(student).config.get_text_config().vocab_size
        # A teacher with a tokenizer of its own has no id in common with the student, whatever their numbers.
        own = self.requirements.other is not None
        self.vocab_size = None if own else self.teacher.shared_ids(tokenizer, rows, pair.teacher_tokenizer)
        return student, tokenizer, train_rows, eval_rows

    def _collator(self, given: Any, student: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Make batches by the user's collator, or by the method's own."""
        known_ids = self.vocab_size or models.causal_lm_of(student).config.get_text_config().vocab_size
        padding, other = models.padding_id(tokenizer, known_ids), self.requirements.other
        own = with_ids(self.build_collator(tokenizer), padding, known_ids, other)
        takes = models.extra_inputs(student)
        return fitted(given, own, method=self.method_name, packing=self.args.packing, takes=takes)

    def make_student(self, source: Any, trains: bool = True) -> nn.Module:
        """Load the student from a name, or take the model, with its adapter, ready for the loss in its head."""
        self.student_source = source
        check_adapter(self.args, self.adapter)
        set_seed(self.args.seed)  # adapters start at random
        student = load_student(source, self.args, self.adapter, self.quantization, trains)
        models.unquantized(student)  # by an earlier trainer
        if self.args.quantize_student is not None:
            models.fake_quantize(student, self.args.quantize_student, group_size_of(self.args))
        return models.install_token_forward(student)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        moved = sorted({"needs", "samples_completions", "needs_completions", "prepare_rows"} & vars(cls).keys())
        if moved:
            raise ConfigurationError(f"{cls.__name__} defines {moved[0]}; expected it on {cls.config_class.__name__}.")
        arguments.show_parameters(cls)

    def _refuse_launch(self) -> None:
        """What only the accelerator tells."""
        if self.args.n_gpu > 1:
            raise ConfigurationError(
                f"Got {self.args.n_gpu} GPUs in one process (nn.DataParallel); expected one GPU per process. "
                "Start with `accelerate launch`, or make one GPU visible with CUDA_VISIBLE_DEVICES=0."
            )
        if models.fsdp_version(self.accelerator) == 1:
            raise ConfigurationError(
                "Got FSDP version 1, which flattens the head's weight; expected `fsdp_version: 2`."
            )
        if models.zero_stage(self.accelerator) == 3 and models.balance_coefficient(self.model):
            raise ConfigurationError(
                "Got `output_router_logits: true` in the student's config under ZeRO-3, where the backward pass of the "
                "loss that balances its experts fails; expected ZeRO-2, DDP or FSDP2, or `output_router_logits: false`."
            )
        if self.args.packing and models.balance_coefficient(self.model):
            raise ConfigurationError(
                "Got `packing: true` with `output_router_logits: true` in the student's config: the loss that balances "
                "its experts would count padding, for which packed batches have no mask. Set one of them to false."
            )
        refuse_sharded(self.args, self.accelerator)
        refuse_uneven_sampling(self.args, self.accelerator, self.requirements.samples_completions)
        publishing.check_merger(self.args, self.model, self.accelerator)

    def _start(self) -> None:
        """The rollout engine, the callbacks, and what is remembered from step to step."""
        args = self.args
        if self.requirements.samples_completions:
            self.engine = build_engine(
                args.rollout_engine,
                model=self.model,
                accelerator=self.accelerator,
                tokenizer=self.processing_class,
                max_length=args.max_length,
                batch_size=args.rollout_batch_size,
                vllm_options=args.vllm_kwargs,  # type: ignore[arg-type]  # parsed by now
            )
            if self.engine.runs_the_model:
                models.check_can_generate(self.model)
        self.callback_handler.callbacks.insert(0, TrlNames())
        self.add_callback(StepLoss(self))
        self.set_up_method()
        if args.eval_measures:
            self.add_callback(HeldOutMeasures(self))
        self.recorder = RunRecorder(self)
        self.add_callback(self.recorder)
        self.add_callback(TeacherKeeper(self.teacher))
        self.proof, self.sentinel = Proof(self), Sentinel(self)
        self.add_callback(self.sentinel)
        self.run_checkpoints: list[str] = []  # that this run has saved, or went on from

    def set_up_method(self) -> None:
        """Set up what is remembered from step to step; also when `model_init` has made the student anew."""
        args, autocast, extras = self.args, self.compute_loss_context_manager, models.extra_inputs(self.model)
        self.sampling = sampling_settings(args, self.model, self.processing_class, self.vocab_size)
        other = self.requirements.other and self.requirements.other.ended_by(student=self.sampling.eos_token_ids)
        known = self.teacher, self.vocab_size, args.loss_chunk_bytes, autocast, extras, other, args.alm_temperature
        self.two_models = TwoModels(*known, hidden_match(args, self.model, self.teacher))
        self.aligned_loss = None if other is None else aligned_loss(args, other)
        self.two_models.aligned_loss = self.aligned_loss if args.compares_chunks else None
        self.window_loss = torch.zeros((), device=args.device)  # of the micro-steps since the last optimiser step
        self.metrics = RunningMetrics(args.device)
        self._eval_rows: list[Tensor] | None = None
        self._eval_names: list[str] = []
        self.last_eval_metrics: dict[str, float] = {}
        self._eval_is_filled: dict[int, tuple[Any, ...]] = {}

    def add_callback(self, callback: Any) -> None:
        """Add a callback, a class or an instance; anything else would fail at the next event."""
        arguments.check_kind(type(self).__name__, "callbacks", [callback], of="add_callback()")
        super().add_callback(callback)

    def create_accelerator_and_postprocess(self) -> None:
        models.let_fsdp_shard_on_cpu(self.args)
        super().create_accelerator_and_postprocess()

    # ---- What a method overrides ------------------------------------------------------------------------------------

    def configured(self, args: Any) -> Any:
        """Take up in the config what the constructor was given in the place of settings."""
        return args

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each term of `distill_terms` in the loss; terms not named here are only logged."""
        raise NotImplementedError(f"{type(self).__name__} must say how its terms are weighted.")

    @property
    def loss_divisors(self) -> dict[str, str]:
        """Terms that are not means over all trained tokens: name of the batch entry `token_*` whose sum divides them.

        The sum goes over the trained tokens of the whole optimiser step. So a term over some of the tokens is their
        mean with an entry that is 1 on them (the term itself must be 0 elsewhere), and a mean over rows with an entry
        that is 1 once a row.
        """
        return {}

    def distill_terms(
        self, student: TokenLogits, teacher: TokenLogits | None, tokens: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute the method's loss, as per-token values: a pure function that runs on chunks of n tokens.

        Args:
            student, teacher: logits `[n, V]` of both models for the same tokens.
            tokens: `labels` `[n]`, and every batch entry `[B, T]` whose name starts with `token_`.

        Returns:
            `[n]` values by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must define its per-token terms.")

    def row_terms(
        self, logps: Tensor, teacher_logps: Tensor | None, tokens: Mapping[str, Tensor], num_rows: int
    ) -> dict[str, Tensor]:
        """Compute terms of whole rows, for methods with `has_row_terms`: a pure function of log-probabilities.

        Args:
            logps, teacher_logps: `[N]` of all trained tokens; the former receives gradients, the latter may be None.
            tokens: as in `distill_terms`, and `row` `[N]`, which of the batch's `num_rows` each token belongs to.

        Returns:
            `[N]` values by name, those of a row on any one of its tokens; entries `token_*` are for `distill_terms`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define its terms of rows.")

    def agreement_terms(self, student: Any, teacher: Any, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute what evaluation measures beside the method's own terms, per token."""
        if TEACHER_LOGPS in tokens:  # the teacher has ids of its own: what it says of theirs has no id of the student's
            teacher = TokenLogprobs(tokens[TEACHER_LOGPS])
        return agreement_terms(student, teacher, tokens, self.args.temperature)

    def build_collator(self, tokenizer: PreTrainedTokenizerBase) -> DistillCollator:
        """Build what makes batches of rows."""
        return DistillCollator(
            pad_token_id=tokenizer.pad_token_id,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            with_prompts=self.requirements.samples_completions,
        )

    def rollout(self, batches: list[Batch]) -> list[Batch]:
        """Replace completions of the accumulation window; the identity by default."""
        return batches

    def score(self, batches: list[Batch]) -> list[Batch]:
        """Add per-token entries `token_*`; the identity by default."""
        return batches

    def next_batches(self, epoch_iterator: Iterator, num_batches: int) -> list[Batch]:
        """Return what an optimiser step starts from."""
        return list(itertools.islice(epoch_iterator, num_batches))

    def teacher_signal(self, inputs: Batch, predicts: Tensor) -> TeacherSignal | None:
        """Ask the teacher about the tokens that `predicts` marks (`Teacher.signal`), for each micro-batch."""
        return self.two_models.signal(inputs, predicts)

    def after_step(self, loss: float) -> None:
        """Take the step's loss over all micro-batches and processes; called on every process after each step."""

    def method_state(self) -> dict[str, Any]:
        """Return what of the method must survive in a checkpoint, as JSON."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take up `method_state` again."""

    # ---- The training path ------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return a step's batches, after rollouts, and what their terms are divided by (`step_counts`)."""
        if 0 < self.state.max_steps <= self.state.global_step:
            # Resumed from the checkpoint of the last step; transformers looks whether a run is done after steps only.
            self.control.should_training_stop = True
            return [], None
        with self.teacher.holding_failures():
            batches = self.next_batches(epoch_iterator, num_batches)
            if not self.state.global_step:
                check_first_window(len(batches), num_batches, self.args)
            if len(batches) < num_batches:
                # Only the end of a stream comes unannounced: no optimiser step would follow, and the gradient of these
                # batches would be added to the next epoch's first.
                batches = []
            if batches:
                batches = self.score([self.two_models.completed(batch) for batch in self.rollout(batches)])
                self.two_models.ask_ahead(batches, self.teacher_signal)
        counts = step_counts(batches, self.loss_divisors)
        return batches, self.accelerator.reduce(counts.to(device), reduction="sum")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        models.keep_optimizer(self.accelerator, optimizer)
        return optimizer

    def _prepare_input(self, data: Any) -> Any:
        # Not in the dtype of DeepSpeed's engine: models read integers, and log-probabilities would lose their digits.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum up the method's terms by weight, each divided by its tokens in the whole step.

        Args:
            num_items_in_batch: what `get_batch_samples` counted; None counts this batch alone.
        """
        missing = sorted(set(self.loss_divisors.values()) - inputs.keys())
        if missing:
            raise DatasetError(
                f"Got a batch without `{missing[0]}`, which {self.method_name} adds to the batches of a whole step; "
                "expected one that `get_batch_samples(iterator, number, device)` has returned."
            )
        counts = step_counts([inputs], self.loss_divisors)
        of_step = counts if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        world_size = 1 if num_items_in_batch is None else self.accelerator.num_processes
        weights = step_weights(self.loss_weights, of_step, self.loss_divisors)
        with self.teacher.holding_failures() if model.training else contextlib.nullcontext():
            total, terms = self.token_terms(model, inputs, self.distill_terms, weights)
        if model.training and self.accelerator.sync_gradients:
            outage.end_together(self, self.last_step)
        loss = token_mean(total, of_step.flatten()[0], world_size)
        balance = terms.pop(models.AUX_LOSS, None)
        if balance is not None:
            micro_batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + window_mean(models.balance_coefficient(model) * balance, micro_batches)
            self.metrics.add_means({models.AUX_LOSS: balance.detach()}, 1)
        if model.training:
            self.proof.look(inputs)
            self.sentinel.look(inputs)
            self.window_loss = self.window_loss + loss.detach()
            self.metrics.add_batch(inputs, counts.flatten()[0])
            self.metrics.add_terms(self.teacher.names, inputs, terms, self.loss_divisors | self.logged_divisors)
        return (loss, {"loss": loss, **terms}) if return_outputs else loss

    def token_terms(
        self, model: nn.Module, inputs: Batch, terms_fn: Any, weights: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Call `TwoModels.terms` on a micro-batch, with what the method asks of the teacher and its terms of rows."""
        row_terms = self.row_terms if self.has_row_terms else None
        return self.two_models.terms(model, inputs, self.teacher_signal, terms_fn, weights, row_terms)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = models.whole(super()._get_grad_norm(model, grad_norm=grad_norm))  # each has a share under FSDP2
        self.sentinel.gradient_norm = grad_norm
        if self.accelerator.scaler is None and grad_norm is not None:  # fp16's scaler skips such steps by itself
            self.window_loss = self.window_loss + 0 * torch.as_tensor(grad_norm, device=self.args.device)  # keeps NaN
        return grad_norm

    # ---- Logging ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms' means, and what rollouts there were, since the last training log."""
        if "loss" in logs and self.metrics:
            rollouts = {"rollouts": 0.0} if self.requirements.samples_completions else {}
            logs = {**logs, **rollouts, **self.metrics.read(self.accelerator)}
        # The log keeps them all: one name each.
        super().log({sys.intern(name): value for name, value in logs.items()}, start_time)
