"""Settings that every distillation trainer shares."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from transformers import TrainingArguments

from ..data import prepare_dataset
from ..data.feedback import FeedbackRows
from ..data.reward_rows import RewardRows
from ..data.teacher_prompts import TeacherPrompts
from ..data.tokenization import Needs
from ..evaluation.measures import MEASURES, METRICS, higher_is_better
from ..exceptions import ConfigurationError, refuse_unknown_keys
from ..losses.aligned import DEFAULT_TERMS, OF_TEXT, TERMS
from ..losses.sampler_ratio import CORRECTIONS
from ..losses.workspace import chunk_bytes_of
from ..redaction import hidden
from ..requirements import Requirements
from ..rollouts import ENGINES
from ..settings import documented, require, setting
from ..teachers.options import TeacherOptions
from ..value_types import check_mappings, check_settings
from .aligned import check_terms
from .given.carrying import carried
from .given.correction import check_ahead, check_correction
from .given.fields import ARGUMENTS, also_taken, check_arguments, refusals_of_transformers
from .given.optimizer import check_optimizer, check_schedule
from .given.packages import check_before_devices
from .given.quantized import check_quantization
from .given.token_batches import check_token_batches


@documented
@dataclass
class DistillConfig(TeacherOptions, TrainingArguments):
    """`transformers.TrainingArguments` plus what every method needs.

    Two temperatures are kept apart: `kd_temperature` softens both distributions inside the loss, `temperature` is
    that of the sampling distribution of rollouts.

    Raises:
        ConfigurationError: values out of range, or settings that contradict each other, by name.
    """

    if TYPE_CHECKING:
        output_dir: str = "trainer_output"  # declared optional, but never None once TrainingArguments has filled it in

    # Defaults of TrainingArguments that suit distillation better.
    logging_steps: float = setting(10, "Log every so many optimiser steps (below 1: a share of all).")
    logging_nan_inf_filter: bool = setting(
        False, "Off: a NaN stops training instead of being hidden, and no micro-step waits for the device."
    )
    remove_unused_columns: bool = setting(False, "Must stay off: the collator reads more than forward does.")

    # Models
    model_init_kwargs: dict[str, Any] | str | None = setting(
        None, "Keyword arguments of `from_pretrained` for a student given by name (JSON)."
    )
    trust_remote_code: bool = setting(False, "Allow models and tokenizers with code of their own.")
    disable_dropout: bool = setting(
        True, "Set the student's dropout to 0: its noise would be matched against the teacher."
    )

    quantize_student: str | None = setting(
        None, "Train with the linear layers' weights rounded to int8 or int4, and save these integers (torchao)."
    )
    quantize_group_size: int | None = setting(
        None, "With quantize_student: neighbouring weights that share a scale (32 by default).", least=2
    )

    # Data
    max_length: int | None = setting(
        1024, "Longest prompt plus completion, in tokens; null cuts nothing.", least=2, words="at least 2 tokens"
    )
    assistant_only_loss: bool = setting(False, "With `messages`: train on every assistant turn, not only on the last.")
    column_mapping: dict[str, str] | str | None = setting(
        None, "Rename dataset columns, such as {question: prompt, answer: completion} (JSON)."
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(None, "Extra variables for the chat template (JSON).")
    dataset_num_proc: int | None = setting(None, "Processes for tokenisation.", least=1, most=1024)
    pad_to_multiple_of: int | None = setting(None, "Pad batches to a multiple of this length.", least=1)
    per_device_train_tokens: int | None = setting(
        None,
        "In place of per_device_train_batch_size: batches of rows of about one length, each of at most so many tokens, "
        "padding counted.",
        least=1,
    )
    packing: bool = setting(
        False, "Train on several rows in one of up to `max_length` tokens, which do not see each other."
    )

    # Loss
    kd_temperature: float = setting(1.0, "Divides the logits of student and teacher inside the divergence.", above=0)
    cross_tokenizer: dict[str, float] | str | None = setting(
        None,
        f"With teacher_tokenizer: terms of the loss and their weights, of {', '.join(TERMS)}; by default "
        f"{DEFAULT_TERMS} (JSON).",
    )
    alm_temperature: float | None = setting(
        None,
        "With teacher_tokenizer: τ of alm, which divides log-probabilities of chunks; by default its limit, τ → ∞.",
        above=0,
    )
    hidden_weight: float = setting(
        0.0,
        "Weight of the relative squared error of hidden states, layer by layer: for students that were made of their "
        "teacher, of its width; 0 compares none.",
        least=0,
    )
    hidden_layers: list[int] | None = setting(
        None,
        "With hidden_weight: of each of the student's layers, the teacher's (from 0) whose output it is held against; "
        "by default what a student that was made of this teacher remembers.",
    )
    loss_chunk_mib: float | None = setting(
        None, "Budget for one chunk of logits in the fused head, in MiB per buffer (32 on CPU, else 1024).", above=0
    )

    # Rollouts
    max_new_tokens: int = setting(128, "Longest sampled completion, in tokens.", least=1, words="at least 1 token")
    temperature: float = setting(
        1.0,
        "Sampling temperature of rollouts; 0 takes the most likely token.",
        least=0,
        words="0 (greedy) or a positive number",
    )
    max_completion_length: int | None = setting(
        None, "TRL's name of max_new_tokens.", least=1, words="at least 1 token"
    )
    top_p: float | None = setting(1.0, "Nucleus filter of rollouts; 1 is off.", above=0, most=1)
    top_k: int | None = setting(0, "Top-k filter of rollouts; 0 is off.", least=0)
    min_p: float | None = setting(
        0.0, "Drop tokens below this share of the likeliest token's probability; 0 is off.", least=0, below=1
    )
    repetition_penalty: float | None = setting(
        1.0, "Above 1, tokens already in prompt or completion become less likely; 1 is off.", above=0
    )
    stop_strings: list[str] | None = setting(None, "A completion also ends with the first of these, which it keeps.")
    rollout_engine: str = setting("decode", f"Who samples the student's completions: one of {', '.join(ENGINES)}.")
    rollout_batch_size: int | None = setting(
        None, "Prompts sampled together; by default the whole accumulation window at once.", least=1
    )
    sampler_correction: str = setting(
        "none",
        "Weights for sampled text of which student and sampler differ, by ratios of their probabilities, bounded by "
        f"sampler_ratio_min and _max: one of {', '.join(CORRECTIONS)} (exact, for short text).",
    )
    sampler_ratio_min: float | None = setting(
        None, "Least ratio: mask drops what is below, truncate raises it.", least=0, most=1
    )
    sampler_ratio_max: float | None = setting(
        2.0, "Largest ratio: mask drops what is above, truncate lowers it.", least=1
    )
    sample_ahead: bool = setting(
        False,
        "With a vLLM server and sampler_correction: the text of the next step is sampled while this one trains, by "
        "weights that are one step old.",
    )
    vllm_kwargs: dict[str, Any] | str | None = setting(
        None, "For rollout_engine vllm: {mode: server, …}, or arguments of vLLM's LLM (JSON)."
    )
    completions_dir: str | None = setting(
        None, "Where the teacher's completions are kept; by default `<output_dir>/completions`."
    )

    # Resuming
    resume_anyway: bool = setting(
        False, "Go on from a checkpoint though settings differ that an exact resumption needs; they are listed."
    )
    overwrite_output_dir: bool = setting(
        False, "Start anew where `output_dir` has checkpoints, which is refused unless it is said."
    )

    # The finished student
    merge_adapter: bool = setting(
        False, "Also save the student with its adapter merged, in `<output_dir>/merged`, and upload that."
    )
    verify_saved: bool = setting(
        True, "Load what was saved once more, and compare its logits with the trained student's on one batch."
    )
    card_license: str | None = setting(
        None, "Licence in the model card; by default the one that teacher, student and data share."
    )

    # Evaluation
    eval_measures: list[str] | None = setting(
        None,
        "Measured as well at each evaluation, on held-out prompts: agreement, rouge_l, accuracy, diversity, "
        "consistency, exposure_bias, calibration.",
    )
    eval_measures_rows: int = setting(16, "They are taken on so many of the first rows of the evaluation set.", least=1)
    eval_measures_seeds: int = setting(1, "Samples of each of these prompts.", least=1)
    eval_measures_shown: int = setting(
        3, "Prompts whose completions by student and teacher are logged side by side.", least=0
    )

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "teacher_model_init_kwargs",
        "teacher_weights",
        "extrapolate",
        "weak_to_strong",
        "column_mapping",
        "cross_tokenizer",
        "chat_template_kwargs",
        "vllm_kwargs",
    ]

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Name a setting that is not one, before Python says no more than that."""
        refuse_unknown_keys(given, {f.name for f in fields(cls) if f.init}, f"the arguments of {cls.__name__}")
        return super().__new__(cls)

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        cls.__repr__ = DistillConfig.__str__  # type: ignore[assignment, method-assign]  # before `dataclass` gives one that tells all

    def __str__(self) -> str:
        told = sorted((f.name, hidden(getattr(self, f.name, None), f.name)) for f in fields(self))
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in told)})"

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Do as `transformers.TrainingArguments`, without secrets at any depth: trackers are given it."""
        return hidden(super().to_dict())

    def __post_init__(self) -> None:
        self._check_values()
        self._fill_in()
        self._check()
        if self.load_best_model_at_end and not self.metric_for_best_model:
            self.metric_for_best_model = "eval_perplexity"
        if self.metric_for_best_model and self.greater_is_better is None:
            metric = self.metric_for_best_model.partition("/")[0]  # behind it, the name of one of several teachers
            name = metric.removeprefix("eval_")  # behind the name of one of several sets, maybe
            of_loss = any(f"_{name}".endswith(f"_{term}") for term in self.loss_terms or ()) and name not in MEASURES
            self.greater_is_better = not of_loss and higher_is_better(metric)
        check_before_devices(self)
        with refusals_of_transformers():
            super().__post_init__()
        check_schedule(self)
        check_optimizer(self)
        self._check_accelerator()
        if self.use_liger_kernel:
            self._keep_the_forward()

    @property
    def loss_chunk_bytes(self) -> int:
        """`loss_chunk_mib`, or its default for the device."""
        return chunk_bytes_of(self.loss_chunk_mib, self.device.type)

    # ---- What a method asks of its rows and its teacher; its config overrides these ---------------------------------

    may_be_infinite: ClassVar[frozenset[str]] = frozenset(
        {"max_grad_norm", "teacher_server_patience", "alm_temperature"}
    )
    stands_for: ClassVar[frozenset[str]] = frozenset()  # names of configs whose own settings mean the same here
    accepts_sparse_teachers: ClassVar[bool] = False  # whether `distill_terms` reads a `TokenTopK` and a `TokenSampled`
    accepts_encoder_decoders: ClassVar[bool] = False  # whether students such as T5 train; batches have `encoder_ids`
    reads_first_row: ClassVar[bool] = False  # whether `requirements` depend on the layout of the data
    weighs_samples: ClassVar[bool] = False  # whether the loss is an expectation over the student's own text
    scores_all_text: ClassVar[bool] = True  # whether evaluation's likelihood is that of all trained text
    has_plain_text_loss: ClassVar[bool] = False  # whether the trainer takes a `pretraining_dataset`

    @property
    def why_no_packing(self) -> str:
        """What keeps `packing` from working, as the end of a sentence; empty: nothing."""
        return "every step samples completions for single prompts" if self.samples_completions else ""

    @property
    def why_fixed_rows(self) -> str:
        """What keeps `per_device_train_tokens` from working, as the end of a sentence; empty: nothing."""
        return ""

    @property
    def why_no_hidden_states(self) -> str:
        """What keeps `hidden_weight` from working, as the end of a sentence; empty: nothing."""
        return ""

    @property
    def sequences_of_row(self) -> int:
        """How many sequences a batch has of each of its rows, at the most."""
        return 1

    @property
    def why_no_views(self) -> str:
        """What keeps the teacher from reading another prompt than the student, as the end of a sentence."""
        return "packed rows follow one another, without prompts of their own (`packing: true`)" if self.packing else ""

    @property
    def why_one_teacher(self) -> str:
        """What keeps rows from having teachers of their own, as the end of a sentence; empty: nothing."""
        return "packed rows are read as one" if self.packing else ""

    @property
    def why_shared_tokenizer(self) -> str:
        """What keeps the teacher from having a tokenizer of its own, as the end of a sentence; empty: nothing."""
        return "the loss compares both models id by id"

    @property
    def aligned_terms(self) -> dict[str, float]:
        """Weights of the terms against a teacher with a tokenizer of its own; none where it shares the student's."""
        return dict(self.cross_tokenizer or DEFAULT_TERMS) if self.has_own_tokenizer else {}  # type: ignore[arg-type]

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of signal that the teacher must give; with none, there may be no teacher."""
        return frozenset({"distribution"})

    @property
    def loss_terms(self) -> frozenset[str] | None:
        """Names of the terms that evaluation logs and adds up to the loss; None where a method does not tell."""
        return None

    @property
    def follows_teacher_alone(self) -> bool:
        """Whether a teacher that says what the student says leaves nothing to learn."""
        return False

    @property
    def other_scores(self) -> frozenset[str]:
        """Names of what evaluation logs besides."""
        return frozenset()

    @property
    def samples_completions(self) -> bool:
        """Whether training batches may get student rollouts, so that they must carry prompts."""
        return False

    @property
    def needs_completions(self) -> bool:
        """Whether training rows must come with a completion."""
        return not self.samples_completions

    @property
    def replaces_completions(self) -> bool:
        """Whether the teacher's own completions take the place of the dataset's."""
        return False

    @classmethod
    def taken_from(cls, args: TrainingArguments, changed: dict[str, Any]) -> dict[str, Any]:
        """Return settings that a config of another trainer says in other words.

        Args:
            changed: settings of `args` that have no counterpart by name; those that are read are taken out.
        """
        return {}

    def requirements(self, first_row: Mapping[str, Any] | None = None) -> Requirements:
        """Return all of it at once, for a training dataset.

        Args:
            first_row: of the training data, for configs with `reads_first_row`.
        """
        return Requirements(
            trainer=type(self).__name__.removesuffix("Config") + "Trainer",
            needs=self._needs_of_ids(),
            samples_completions=self.samples_completions,
            needs_completions=self.needs_completions,
            replaces_completions=self.replaces_completions,
            reuses_rollouts=getattr(self, "reuses_rollouts", False),
            accepts_sparse_teachers=self.accepts_sparse_teachers and not self.has_own_tokenizer,
            accepts_next_bytes=self._accepts_next_bytes,
            accepts_encoder_decoders=self.accepts_encoder_decoders,
            divergence=getattr(self, "divergence", "forward_kl"),
            kd_temperature=self.kd_temperature,
        )

    def _needs_of_ids(self) -> frozenset[str]:
        """`needs`; of a teacher's own ids some losses take no more than log-probabilities of tokens."""
        if not self.has_own_tokenizer or "distribution" not in self.needs or self.compares_distributions:
            return self.needs
        return self.needs - {"distribution"} | {"token_logprobs"}

    @property
    def compares_chunks(self) -> bool:
        """With a teacher that has a tokenizer of its own: whether the loss is made of `aligned_terms`."""
        return True

    @property
    def compares_distributions(self) -> bool:
        """With a teacher that has a tokenizer of its own: whether the loss reads more than likelihoods of its text."""
        return self.compares_chunks and bool(self.aligned_terms.keys() - {"alm"})

    @property
    def _accepts_next_bytes(self) -> bool:
        of_text = self.aligned_terms.keys() <= OF_TEXT and self.kd_temperature == 1
        return self.has_own_tokenizer and (of_text or not self.compares_distributions)

    def check_datasets(self, train: Any, evaluation: Any, text: Any, wants: Requirements) -> None:
        """Refuse datasets that cannot go with these settings, before anything is loaded.

        Args:
            evaluation: a dataset, a dict of several, or None.
            text: the pretraining dataset of methods that have one.
        """

    def prepare_rows(self, dataset: Any, tokenizer: Any, name: str, wants: Requirements) -> Any:
        """Tokenise a raw dataset; `name` "train" must serve the method, any other only evaluation."""
        training = name == "train"
        answers = wants.samples_completions or wants.replaces_completions
        if training and answers:
            needs: Needs = "both" if wants.needs_completions else "prompt"
        else:
            needs = "completion" if training and wants.needs_completions else "either"
        return prepare_dataset(
            dataset,
            tokenizer,
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens if self.answers_prompts(name, wants) else None,
            column_mapping=self.column_mapping,  # type: ignore[arg-type]  # parsed by now
            assistant_only_loss=self.assistant_only_loss,
            chat_template_kwargs=self.chat_template_kwargs,  # type: ignore[arg-type]  # parsed by now
            num_proc=self.dataset_num_proc,
            needs=needs,
            name=name,
            teachers=() if name == "pretraining" else wants.teachers,
            teacher_column=self.teacher_column,
            teacher_prompts=self.teacher_prompts(wants),
            feedback=self.feedback_rows(wants) if training else None,
            rewards=self.reward_rows(training) if name != "pretraining" else None,
        )

    def reward_rows(self, training: bool) -> RewardRows | None:
        """Say what rows must bring for rewards of the student's text; None: there are none."""
        return None

    def feedback_rows(self, wants: Requirements) -> FeedbackRows | None:
        """Say what training rows must bring for feedback on the student's attempts; None: there is none."""
        return None

    def teacher_prompts(self, wants: Requirements) -> TeacherPrompts:
        """Say what the teacher is asked in place of the student's prompt; `reading` tells whether that is anything."""
        return TeacherPrompts(
            system=self.teacher_system_prompt,
            prompt=self.teacher_prompt,
            max_length=self.teacher_max_length,
            drops_long=self.teacher_too_long == "drop",
            writes_later=self.feedback_rows(wants) is not None,
            why_not=self.why_no_views,
            tokenizer=wants.teacher_tokenizer,
            why_no_chat=wants.why_no_chat,
            other=wants.other,
        )

    def answers_prompts(self, name: str, wants: Requirements) -> bool:
        """Tell whether prompts of the dataset `name` must leave room for sampled completions."""
        return wants.samples_completions or wants.replaces_completions

    @property
    def row_limit(self) -> int:
        """`max_length`, or more than any row has where nothing is cut."""
        return sys.maxsize if self.max_length is None else self.max_length

    # ---- Checks -----------------------------------------------------------------------------------------------------

    def _check_values(self) -> None:
        """Refuse values of another type than declared, and numbers and words that cannot work."""
        token: Any = self.hub_token
        whole = token is None or (isinstance(token, str) and token.split() == [token])
        self._require("hub_token", whole, "the token itself, as text without spaces, or none after `hf auth login`")
        for name in (f.name for f in fields(self) if f.init):
            if isinstance(value := getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(value))
        theirs = {f.name for f in fields(TrainingArguments)}
        check_settings(
            self,
            also=also_taken(),
            bounds={name: argument.bounds for name, argument in ARGUMENTS.items() if argument.bounds is not None},
            may_be_infinite=self.may_be_infinite,
            may_be_blank=theirs - {"output_dir", "resume_from_checkpoint"},
        )
        check_mappings(self)
        check_arguments(self)

    def _fill_in(self) -> None:
        """None turns a filter of sampling off, as in transformers; TRL's name goes before the default of ours."""
        for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
            if getattr(self, name) is None:
                setattr(self, name, off)
        if self.max_completion_length is not None:
            default = next(f.default for f in fields(self) if f.name == "max_new_tokens")
            both = f"one of it and `max_completion_length: {self.max_completion_length}`, which is its name in TRL"
            given = self.max_new_tokens not in (default, self.max_completion_length)
            self._require("max_new_tokens", not given, both)
            self.max_new_tokens, self.max_completion_length = self.max_completion_length, None

    def _check(self) -> None:
        """Refuse what cannot work; subclasses extend it."""
        self._require("rollout_engine", self.rollout_engine in ENGINES, f"one of {', '.join(ENGINES)}")
        check_correction(self)
        check_ahead(self)
        check_terms(self)
        check_quantization(self)
        check_token_batches(self)
        self._check_eval_measures()
        self.check_teacher_options()

    def _check_accelerator(self) -> None:
        """Refuse ways to share batches that rows of different lengths, or counted steps, do not allow."""
        config: Any = self.accelerator_config
        shared = "none or false: each process reads its own rows, since batches of different lengths cannot be shared"
        require(not config.dispatch_batches, "accelerator_config.dispatch_batches", config.dispatch_batches, shared)
        even = "true: a process without a batch would leave the others waiting"
        require(config.even_batches is not False, "accelerator_config.even_batches", config.even_batches, even)
        whole = "false with `per_device_train_tokens`: batches without a fixed number of rows cannot be split"
        splits = config.split_batches and self.per_device_train_tokens is not None
        require(not splits, "accelerator_config.split_batches", config.split_batches, whole)

    def _keep_the_forward(self) -> None:
        """Leave Liger's losses out: they replace the forward that the distillation loss runs in."""
        given = self.liger_kernel_config or {}
        require(isinstance(given, dict), "liger_kernel_config", given, "a mapping, such as {rope: true}")
        config: dict[str, Any] = dict(given)
        for name in ("cross_entropy", "fused_linear_cross_entropy"):
            expected = "false: the distillation loss has a fused head of its own"
            require(not config.get(name), f"liger_kernel_config.{name}", config.get(name), expected)
            config[name] = False
        self.liger_kernel_config = config

    def _check_eval_measures(self) -> None:
        known = [name for name in METRICS if name not in ("perplexity", "speed")]
        unknown = [name for name in self.eval_measures or [] if name not in known]
        require(not unknown, "eval_measures", unknown[:1], f"any of {', '.join(known)}")


def config_from_arguments(config_class: type[DistillConfig], args: TrainingArguments | None) -> DistillConfig:
    """Turn `args` into the method's config: its defaults for None, else what `carrying.carried` finds in them."""
    if args is None:
        return config_class(output_dir="distilled")
    if isinstance(args, config_class):
        return args
    if not isinstance(args, TrainingArguments):
        raise ConfigurationError(f"Got `args` of type {type(args).__name__}; expected {config_class.__name__}.")
    values = carried(args, config_class, {f.name for f in fields(DistillConfig) if f.init})
    values["remove_unused_columns"] = False
    values["logging_nan_inf_filter"] = False
    return config_class(**values)
