"""Settings that every distillation trainer shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainingArguments

from ..data import prepare_dataset
from ..data.tokenization import Needs
from ..evaluation.measures import METRICS, higher_is_better
from ..exceptions import ConfigurationError
from ..requirements import Requirements
from ..rollouts import ENGINES
from ..settings import documented, require, setting
from ..teachers.options import TeacherOptions


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
    lr_scheduler_type: str = setting("cosine", "Learning-rate schedule.")
    weight_decay: float = setting(1e-4, "Weight decay of AdamW.")
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

    # Data
    max_length: int = setting(1024, "Longest prompt plus completion, in tokens.")
    assistant_only_loss: bool = setting(False, "With `messages`: train on every assistant turn, not only on the last.")
    column_mapping: dict[str, str] | str | None = setting(
        None, "Rename dataset columns, such as {question: prompt, answer: completion} (JSON)."
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(None, "Extra variables for the chat template (JSON).")
    dataset_num_proc: int | None = setting(None, "Processes for tokenisation.")
    pad_to_multiple_of: int | None = setting(None, "Pad batches to a multiple of this length.")

    # Loss
    kd_temperature: float = setting(1.0, "Divides the logits of student and teacher inside the divergence.")
    loss_chunk_mib: float | None = setting(
        None, "Budget for one chunk of logits in the fused head, in MiB per buffer (32 on CPU, else 256)."
    )

    # Rollouts
    max_new_tokens: int = setting(128, "Longest sampled completion, in tokens.")
    temperature: float = setting(1.0, "Sampling temperature of rollouts; 0 takes the most likely token.")
    top_p: float = setting(1.0, "Nucleus filter of rollouts; 1 is off.")
    top_k: int = setting(0, "Top-k filter of rollouts; 0 is off.")
    min_p: float = setting(0.0, "Drop tokens below this share of the likeliest token's probability; 0 is off.")
    repetition_penalty: float = setting(
        1.0, "Above 1, tokens already in prompt or completion become less likely; 1 is off."
    )
    stop_strings: list[str] | None = setting(None, "A completion also ends with the first of these, which it keeps.")
    rollout_engine: str = setting("decode", f"Who samples the student's completions: one of {', '.join(ENGINES)}.")
    rollout_batch_size: int | None = setting(
        None, "Prompts sampled together; by default the whole accumulation window at once."
    )
    vllm_kwargs: dict[str, Any] | str | None = setting(
        None, "For rollout_engine vllm: arguments of TRL's VLLMGeneration, such as {mode: server} (JSON)."
    )
    completions_dir: str | None = setting(
        None, "Where the teacher's completions are kept; by default `<output_dir>/completions`."
    )

    # Resuming
    resume_anyway: bool = setting(
        False, "Go on from a checkpoint though settings differ that an exact resumption needs; they are listed."
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
    eval_measures_rows: int = setting(16, "They are taken on so many of the first rows of the evaluation set.")
    eval_measures_seeds: int = setting(1, "Samples of each of these prompts.")
    eval_measures_shown: int = setting(3, "Prompts whose completions by student and teacher are logged side by side.")

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "teacher_model_init_kwargs",
        "column_mapping",
        "chat_template_kwargs",
        "vllm_kwargs",
    ]

    def __post_init__(self) -> None:
        self._check()
        if self.load_best_model_at_end and not self.metric_for_best_model:
            self.metric_for_best_model = "eval_perplexity"
        if self.metric_for_best_model and self.greater_is_better is None:
            self.greater_is_better = higher_is_better(self.metric_for_best_model)
        super().__post_init__()

    @property
    def loss_chunk_bytes(self) -> int:
        """`loss_chunk_mib`, or its default for the device: small chunks stay in a CPU's cache and save memory."""
        mib = self.loss_chunk_mib or (32 if self.device.type == "cpu" else 256)
        return int(mib * 2**20)

    # ---- What a method asks of its rows and its teacher; its config overrides these ---------------------------------

    accepts_sparse_teachers: ClassVar[bool] = False  # whether `distill_terms` reads a `TokenTopK` and a `TokenSampled`
    accepts_encoder_decoders: ClassVar[bool] = False  # whether students such as T5 train; batches have `encoder_ids`
    reads_first_row: ClassVar[bool] = False  # whether `requirements` depend on the layout of the data
    has_plain_text_loss: ClassVar[bool] = False  # whether the trainer takes a `pretraining_dataset`

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of signal that the teacher must give; with none, there may be no teacher."""
        return frozenset({"distribution"})

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

    def requirements(self, first_row: Mapping[str, Any] | None = None) -> Requirements:
        """Return all of it at once, for a training dataset.

        Args:
            first_row: of the training data, for configs with `reads_first_row`.
        """
        return Requirements(
            trainer=type(self).__name__.removesuffix("Config") + "Trainer",
            needs=self.needs,
            samples_completions=self.samples_completions,
            needs_completions=self.needs_completions,
            replaces_completions=self.replaces_completions,
            accepts_sparse_teachers=self.accepts_sparse_teachers,
            accepts_encoder_decoders=self.accepts_encoder_decoders,
            divergence=getattr(self, "divergence", "forward_kl"),
            kd_temperature=self.kd_temperature,
        )

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
        )

    def answers_prompts(self, name: str, wants: Requirements) -> bool:
        """Tell whether prompts of the dataset `name` must leave room for sampled completions."""
        return wants.samples_completions or wants.replaces_completions

    # ---- Checks -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Refuse what cannot work; subclasses extend it."""
        self._require("kd_temperature", self.kd_temperature > 0, "a number above 0")
        self._require("temperature", self.temperature >= 0, "0 (greedy) or a positive number")
        self._require("top_p", 0 < self.top_p <= 1, "a number in (0, 1]")
        self._require("top_k", self.top_k >= 0, "0 (off) or a positive number")
        self._require("min_p", 0 <= self.min_p < 1, "a number in [0, 1)")
        self._require("repetition_penalty", self.repetition_penalty > 0, "a number above 0")
        self._require("rollout_engine", self.rollout_engine in ENGINES, f"one of {', '.join(ENGINES)}")
        self._require("max_length", self.max_length >= 2, "at least 2 tokens")
        self._require("max_new_tokens", self.max_new_tokens >= 1, "at least 1 token")
        mib = self.loss_chunk_mib
        self._require("loss_chunk_mib", mib is None or mib > 0, "a positive number of MiB")
        self._check_eval_measures()
        self.check_teacher_options()
        self._require("remove_unused_columns", not self.remove_unused_columns, "False: the collator needs the columns")
        self._require(
            "label_smoothing_factor",
            self.label_smoothing_factor == 0,
            "0: a teacher's distribution takes the place of smoothed labels",
        )
        self._require(
            "use_liger_kernel",
            not self.use_liger_kernel,
            "False: its fused cross-entropy replaces the forward that the distillation loss runs in",
        )

    def _check_eval_measures(self) -> None:
        known = [name for name in METRICS if name not in ("perplexity", "speed")]
        unknown = [name for name in self.eval_measures or [] if name not in known]
        require(not unknown, "eval_measures", unknown[:1], f"any of {', '.join(known)}")
        for name, least in (("eval_measures_rows", 1), ("eval_measures_seeds", 1), ("eval_measures_shown", 0)):
            self._require(name, getattr(self, name) >= least, f"{least} or more")


def config_from_arguments(config_class: type[DistillConfig], args: TrainingArguments | None) -> DistillConfig:
    """Turn `args` into the method's config: defaults for None, TrainingArguments carried over field by field."""
    if args is None:
        return config_class(output_dir="distilled")
    if isinstance(args, config_class):
        return args
    if not isinstance(args, TrainingArguments):
        raise ConfigurationError(f"Got `args` of type {type(args).__name__}; expected {config_class.__name__}.")
    names = {f.name for f in fields(config_class)}
    values = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in names}
    values["remove_unused_columns"] = False
    values["logging_nan_inf_filter"] = False
    return config_class(**values)
