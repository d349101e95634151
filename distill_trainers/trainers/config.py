"""Settings that every distillation trainer shares."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from ..evaluation.measures import METRICS, higher_is_better
from ..exceptions import ConfigurationError
from ..rollouts import ENGINES
from ..teachers.cache.kinds import CACHE_KINDS
from ..teachers.placement import PLACEMENTS, check_settings
from ..teachers.remote.wire import NUMBER_DTYPES, SERVER_KINDS


@dataclass
class DistillConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus what every method needs. Each field is explained by its `help`.

    Two temperatures are kept apart: `kd_temperature` softens both distributions inside the loss, `temperature` is
    that of the sampling distribution of rollouts.

    Raises:
        ConfigurationError: values out of range, or settings that contradict each other, by name.
    """

    if TYPE_CHECKING:
        output_dir: str = "trainer_output"  # declared optional, but never None once TrainingArguments has filled it in

    # Defaults of TrainingArguments that suit distillation better.
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many optimiser steps (below 1: a share of all)."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Off: a NaN stops training instead of being hidden, and no micro-step waits for the device."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator reads more than forward does."}
    )

    # Models
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for a student given by name (JSON)."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for a teacher given by name (JSON)."}
    )
    teacher_placement: str = field(
        default="auto",
        metadata={"help": f"Where the teacher's weights are, whatever the student's: one of {', '.join(PLACEMENTS)}."},
    )
    teacher_adapter: str | None = field(
        default=None,
        metadata={
            "help": "With adapter_off: the teacher is this adapter on the student's base (name, folder, Hub id)."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models and tokenizers with code of their own."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set the student's dropout to 0: its noise would be matched against the teacher."},
    )

    # Data
    max_length: int = field(default=1024, metadata={"help": "Longest prompt plus completion, in tokens."})
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "With `messages`: train on every assistant turn, not only on the last."}
    )
    column_mapping: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": "Rename dataset columns, such as {question: prompt, answer: completion} (JSON)."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Extra variables for the chat template (JSON)."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes for tokenisation."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Pad batches to a multiple of this length."})

    # Loss
    kd_temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits of student and teacher inside the divergence."}
    )
    loss_chunk_mib: float | None = field(
        default=None,
        metadata={"help": "Budget for one chunk of logits in the fused head, in MiB per buffer (32 on CPU, else 256)."},
    )

    # Rollouts
    max_new_tokens: int = field(default=128, metadata={"help": "Longest sampled completion, in tokens."})
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of rollouts; 0 takes the most likely token."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus filter of rollouts; 1 is off."})
    top_k: int = field(default=0, metadata={"help": "Top-k filter of rollouts; 0 is off."})
    min_p: float = field(
        default=0.0, metadata={"help": "Drop tokens below this share of the likeliest token's probability; 0 is off."}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Above 1, tokens already in prompt or completion become less likely; 1 is off."}
    )
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "A completion also ends with the first of these, which it keeps."}
    )
    rollout_engine: str = field(
        default="decode", metadata={"help": f"Who samples the student's completions: one of {', '.join(ENGINES)}."}
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={"help": "Prompts sampled together; by default the whole accumulation window at once."},
    )
    vllm_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "For rollout_engine vllm: arguments of TRL's VLLMGeneration, such as {mode: server} (JSON)."},
    )
    completions_dir: str | None = field(
        default=None,
        metadata={"help": "Where the teacher's completions are kept; by default `<output_dir>/completions`."},
    )

    # The finished student
    merge_adapter: bool = field(
        default=False,
        metadata={"help": "Also save the student with its adapter merged, in `<output_dir>/merged`, and upload that."},
    )
    card_license: str | None = field(
        default=None,
        metadata={"help": "Licence in the model card; by default what follows from teacher, student and data."},
    )

    # Teacher cache
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder in which the teacher's answers are kept; what is missing is added as it is met."},
    )
    teacher_cache_kind: str = field(
        default="hidden",
        metadata={"help": f"What is kept of each trained token: one of {', '.join(CACHE_KINDS)}; hidden is exact."},
    )
    teacher_cache_top_k: int = field(default=64, metadata={"help": "Ids kept per token by the kind topk."})
    teacher_cache_draws: int = field(default=50, metadata={"help": "Draws per token of the kind sampled."})
    teacher_cache_dtype: str | None = field(
        default=None,
        metadata={"help": "Of what is kept; by default hidden states as the teacher gives them, else float32."},
    )

    # Evaluation
    eval_measures: list[str] | None = field(
        default=None,
        metadata={
            "help": "Measured as well at each evaluation, on held-out prompts: agreement, rouge_l, accuracy, "
            "diversity, consistency, exposure_bias, calibration."
        },
    )
    eval_measures_rows: int = field(
        default=16, metadata={"help": "They are taken on so many of the first rows of the evaluation set."}
    )
    eval_measures_seeds: int = field(default=1, metadata={"help": "Samples of each of these prompts."})
    eval_measures_shown: int = field(
        default=3, metadata={"help": "Prompts whose completions by student and teacher are logged side by side."}
    )

    # Teacher behind HTTP
    teacher_server_kind: str = field(
        default="hidden",
        metadata={"help": f"What a teacher's server is asked for: one of {', '.join(SERVER_KINDS)}; hidden is exact."},
    )
    teacher_server_top_k: int = field(default=64, metadata={"help": "Ids per token of the kind topk."})
    teacher_server_draws: int = field(default=50, metadata={"help": "Draws per token of the kind sampled."})
    teacher_server_dtype: str | None = field(
        default=None,
        metadata={"help": "Of what is sent; by default hidden states as the teacher gives them, else float32."},
    )
    teacher_server_model: str | None = field(
        default=None,
        metadata={"help": "The teacher as an OpenAI-compatible server names it; by default the only one it serves."},
    )
    teacher_server_concurrency: int = field(
        default=8, metadata={"help": "Questions to teacher servers in flight at once, in each process."}
    )
    teacher_server_timeout: float = field(
        default=120.0, metadata={"help": "Seconds without an answer after which an attempt has failed."}
    )
    teacher_server_patience: float = field(
        default=300.0, metadata={"help": "Seconds for which a teacher server that is away is waited for."}
    )

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "teacher_model_init_kwargs",
        "column_mapping",
        "chat_template_kwargs",
        "vllm_kwargs",
    ]

    def __post_init__(self) -> None:
        if self.teacher_cache is not None:
            self.teacher_cache = os.path.expanduser(self.teacher_cache)
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

    @property
    def defers_teacher(self) -> bool:
        """Whether a teacher given by name is loaded only when it is asked."""
        return False

    def _check(self) -> None:
        """Refuse what cannot work; subclasses extend it."""
        require(self.kd_temperature > 0, "kd_temperature", self.kd_temperature, "a number above 0")
        require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or a positive number")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive number")
        require(0 <= self.min_p < 1, "min_p", self.min_p, "a number in [0, 1)")
        require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "a number above 0")
        require(self.rollout_engine in ENGINES, "rollout_engine", self.rollout_engine, f"one of {', '.join(ENGINES)}")
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2 tokens")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1 token")
        require(
            self.loss_chunk_mib is None or self.loss_chunk_mib > 0,
            "loss_chunk_mib",
            self.loss_chunk_mib,
            "a positive number of MiB",
        )
        self._check_teacher_cache()
        self._check_eval_measures()
        self._check_teacher_server()
        check_settings(self)
        require(not self.remove_unused_columns, "remove_unused_columns", True, "False: the collator needs the columns")
        require(
            self.label_smoothing_factor == 0,
            "label_smoothing_factor",
            self.label_smoothing_factor,
            "0: a teacher's distribution takes the place of smoothed labels",
        )
        require(
            not self.use_liger_kernel,
            "use_liger_kernel",
            True,
            "False: its fused cross-entropy replaces the forward that the distillation loss runs in",
        )

    def _check_eval_measures(self) -> None:
        known = [name for name in METRICS if name not in ("perplexity", "speed")]
        unknown = [name for name in self.eval_measures or [] if name not in known]
        require(not unknown, "eval_measures", unknown[:1], f"any of {', '.join(known)}")
        for name, least in (("eval_measures_rows", 1), ("eval_measures_seeds", 1), ("eval_measures_shown", 0)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")

    def _check_teacher_server(self) -> None:
        kind = self.teacher_server_kind
        require(kind in SERVER_KINDS, "teacher_server_kind", kind, f"one of {', '.join(SERVER_KINDS)}")
        draws = self.teacher_server_draws
        require(1 <= draws <= 32767, "teacher_server_draws", draws, "1 to 32767 draws")
        for name in ("teacher_server_top_k", "teacher_server_concurrency"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("teacher_server_timeout", "teacher_server_patience"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a number of seconds above 0")
        dtypes = NUMBER_DTYPES[kind]
        expected = f"one of {', '.join(dtypes)} for {kind}"
        require(
            self.teacher_server_dtype in (None, *dtypes), "teacher_server_dtype", self.teacher_server_dtype, expected
        )

    def _check_teacher_cache(self) -> None:
        kind = self.teacher_cache_kind
        require(kind in CACHE_KINDS, "teacher_cache_kind", kind, f"one of {', '.join(CACHE_KINDS)}")
        draws = self.teacher_cache_draws
        require(self.teacher_cache_top_k >= 1, "teacher_cache_top_k", self.teacher_cache_top_k, "at least 1 id")
        require(1 <= draws <= 32767, "teacher_cache_draws", draws, "1 to 32767 draws")
        dtypes = CACHE_KINDS[kind].dtypes
        require(
            self.teacher_cache_dtype in (None, *dtypes),
            "teacher_cache_dtype",
            self.teacher_cache_dtype,
            f"one of {', '.join(dtypes)} for {kind}",
        )
        require(
            self.teacher_cache is not None or (kind == "hidden" and self.teacher_cache_dtype is None),
            "teacher_cache_dtype" if kind == "hidden" else "teacher_cache_kind",
            self.teacher_cache_dtype if kind == "hidden" else kind,
            "`teacher_cache` beside it: the folder of the cache",
        )


def require(condition: bool, name: str, got: Any, expected: str) -> None:
    """Raise ConfigurationError naming the setting unless `condition` holds."""
    if not condition:
        raise ConfigurationError(f"Got `{name}: {got}`; expected {expected}.")


def config_from_arguments(config_class: type[DistillConfig], args: TrainingArguments | None) -> DistillConfig:
    """`args` as the method's own config: defaults for None, plain TrainingArguments carried over field by field."""
    if args is None:
        return config_class(output_dir="distilled")
    if isinstance(args, config_class):
        return args
    if not isinstance(args, TrainingArguments):
        raise ConfigurationError(f"Got `args` of type {type(args).__name__}; expected {config_class.__name__}.")
    own = {f.name for f in fields(config_class)}
    values = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in own}
    values["remove_unused_columns"] = False
    values["logging_nan_inf_filter"] = False
    return config_class(**values)
