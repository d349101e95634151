"""Every refusal that needs no weights, in one place: trainers, recipes, dry runs and the doctor all call it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import models
from ..data.formats import first_row
from ..data.labels import is_tokenised
from ..data.plain import plain_dataset
from ..exceptions import ConfigurationError, DatasetError
from ..requirements import Requirements
from ..rollouts import check_engine
from ..settings import shown
from ..storage import check_folder
from ..teachers import loading
from ..teachers.base import Pair, Teacher
from ..teachers.members import names_of, read_members
from ..teachers.rows import dataset_rows
from .aligned import refuse_own_tokenizer
from .config import DistillConfig
from .given.best_metric import check_best_metric, check_best_teacher
from .given.lengths import check_positions
from .given.own_teacher import warn_of_nothing_new, warn_of_plain_evaluation
from .given.packages import check_packages
from .given.quantized import check_quantized
from .given.token_batches import check_longest, check_token_rows
from .hidden_states import check_hidden_states
from .lifecycle import held_out_checks, publishing
from .student import student_config, student_tokenizer


@dataclass
class Given:
    """What a run is made of, before anything of it is loaded.

    Attributes:
        pair: both models, and tokenizers that were given.
        train, evaluation, text: raw datasets; the last is that of the loss on plain text.
        quantized: whether the student's weights are loaded in 4 or 8 bits.
        own_scores: whether evaluation gives scores of a function of the user's.
        base: the name that an uploaded adapter would give to its base, if not the student's.
    """

    pair: Pair
    args: DistillConfig
    train: Any = None
    evaluation: Any = None
    text: Any = None
    quantized: bool = False
    base: str | None = None
    own_scores: bool = False


@dataclass
class Ready:
    """What has passed.

    Attributes:
        pair: student and teacher as they were given, with their tokenizers.
        wants: what the method asks of rows and teacher.
        config: of the student.
    """

    given: Given
    pair: Pair
    wants: Requirements
    config: Any

    def rows(self) -> tuple[Any, Any, Any]:
        """Tokenised training, evaluation and plain-text rows, cut and refused as the method wants it.

        Raises:
            DatasetError, ConfigurationError: what is wrong with a dataset, or with a row.
        """
        given = self.given
        train, evaluation = self.prepared(given.train, "train"), given.evaluation
        if isinstance(evaluation, dict):
            evaluation = {name: self.prepared(part, name) for name, part in evaluation.items()}
        else:
            evaluation = self.prepared(evaluation, "eval")
        if not given.own_scores:
            check_best_teacher(given.args, evaluation, self.wants.teachers)
        text = self.prepared(given.text, "pretraining")
        scored = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
        warn_of_plain_evaluation(train, scored)
        every = {**scored, "train": train, "pretraining": text}
        check_positions(every, self.pair.student, self.config, self.pair.teacher, given.args, self.wants)
        check_longest(train, given.args, sampled=given.args.answers_prompts("train", self.wants))
        return train, evaluation, text

    def prepared(self, dataset: Any, name: str) -> Any:
        """One dataset's rows; `name` "train" must serve the method, any other only evaluation."""
        return prepare_rows(self.given.args, dataset, self.pair.tokenizer, name, self.wants)

    def open_teacher(self, train: Any, evaluation: Any) -> Any:
        """The teacher, opened if that takes no weights, and told which rows will come; else as it was given."""
        if self.given.args.disable_dropout:  # else only the loaded student tells whether it has any
            warn_of_nothing_new(self.given.args, train)
        teacher = loading.open_teacher(self.pair, self.given.args)
        self.tell(teacher, train, evaluation, loaded=False)
        return teacher

    def tell(self, teacher: Any, train: Any, evaluation: Any, *, loaded: bool) -> None:
        """Tell a teacher which rows will come: before the student is loaded, unless that may load weights."""
        if not isinstance(teacher, Teacher) or teacher.can_load != loaded:
            return
        if self.wants.samples_completions:
            teacher.expects_rollouts()
        evaluated = evaluation if isinstance(evaluation, dict) else {"evaluation": evaluation}
        for name, dataset in {"training": train, **evaluated}.items():
            if not self.wants.replaces_completions:  # else they are told once they have their completions
                tell_dataset(teacher, dataset, name)


def prepare_rows(
    args: DistillConfig, dataset: Any, tokenizer: PreTrainedTokenizerBase, name: str, wants: Requirements
) -> Any:
    """Tokenised rows of a raw dataset, by the main process first; None stays None."""
    if dataset is None:
        return None
    if name == "train" and isinstance(dataset, IterableDataset) and wants.replaces_completions:
        raise ConfigurationError(
            "The teacher's completions are generated once for a whole dataset, but `train_dataset` is "
            "iterable. Pass a `datasets.Dataset`."
        )
    with args.main_process_first(desc=f"{name} tokenisation"):
        return args.prepare_rows(dataset, tokenizer, name, wants)


def read_stream(rows: IterableDataset, name: str = "eval") -> Dataset:
    """Read a stream of tokenised rows to its end.

    Raises:
        DatasetError: there is none, or none that can be used.
    """
    read = list(rows)
    if not read:
        raise DatasetError(
            f"The stream {name!r} ended without a row that can be used: it is empty, or all of its rows were dropped. "
            "Check its source and its columns (column_mapping); a `datasets.Dataset` tells what it drops, and why."
        )
    return Dataset.from_list(read)


def is_prepared(dataset: Any) -> bool:
    """Tell whether a dataset's rows are those that `prepare_rows` makes."""
    columns = getattr(dataset, "column_names", None)
    if columns is None and isinstance(dataset, IterableDataset):
        columns = first_row(dataset)
    return isinstance(columns, list | dict) and is_tokenised(list(columns))


def refuse_other_layout(args: DistillConfig, dataset: Any, wants: Requirements) -> None:
    """Refuse training rows that would ask something else than those a trainer was made with.

    Raises:
        DatasetError: pairs for prompts, or the other way round.
    """
    if not args.reads_first_row:
        return
    now = args.requirements(first_row(dataset))
    if (now.samples_completions, now.replaces_completions) != (wants.samples_completions, wants.replaces_completions):
        raise DatasetError(
            "Got a `train_dataset` of another layout than the trainer was made with (pairs, or prompts that the models "
            "answer); expected the same one. Make a new trainer for it."
        )


def tell_dataset(teacher: Teacher, dataset: Any, name: str) -> None:
    """Tell a teacher which rows of one tokenised dataset will come; nothing of a stream but that it is one."""
    if dataset is not None:
        teacher.expects(dataset_rows(dataset) if hasattr(dataset, "__len__") else None, name)


def preflight(given: Given) -> Ready:
    """Refuse models, settings and datasets that cannot work, alone or together, before anything is loaded.

    Raises:
        ConfigurationError, DatasetError, VocabularyError, HubError: what was got, what was expected and what to do.
    """
    args, student = given.args, given.pair.student
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        setattr(args, name, models.settled_kwargs(getattr(args, name), name) or None)  # what follows knows one spelling
    teacher = read_members(given.pair.teacher, args)
    given = dataclasses.replace(given, pair=dataclasses.replace(given.pair, teacher=teacher))
    _check_folders(args, given.train is not None)
    _check_parallelism(args)
    models.check_compiler(args)
    given = _plain(given)
    check_packages(args)
    adapted = given.pair.adapted or (isinstance(student, nn.Module) and models.is_peft(student))
    pair = dataclasses.replace(given.pair, adapted=adapted)
    wants = args.requirements(first_row(given.train) if args.reads_first_row and given.train is not None else None)
    wants = dataclasses.replace(wants, streams_rows=given.train is not None and not hasattr(given.train, "__len__"))
    wants = dataclasses.replace(wants, teachers=names_of(teacher, args))
    _check_packing(args, wants)
    _check_view(args, loading.kind_of(teacher, args))
    _check_teachers(args, wants)
    refuse_own_tokenizer(args, loading.kind_of(teacher, args), wants)
    _check_models(given)
    config = student_config(student, args)
    _check_files(pair, config, args)
    wants = dataclasses.replace(wants, encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)))
    _check_architecture(config, teacher, args, wants)
    loading.refuse(pair, args, wants)
    _refuse_weights_without_values(student, "student")
    for _, member in loading.each_teacher(teacher, args):
        _refuse_shared_weights(student, member.given)
        _refuse_weights_without_values(loading.model_of(member.given), "teacher")
    _check_datasets(given, wants)
    quantized = given.quantized or "quantization_config" in (args.model_init_kwargs or {})
    if given.base in (None, student):  # the shape of one that is made of its teacher is known to the recipe
        check_hidden_states(args, config, lambda: _config_of(teacher, args), loading.kind_of(teacher, args))
        check_quantized(student, config, args, quantized)
    publishing.check(args, given.base or student, adapted, quantized)
    if wants.samples_completions:
        check_engine(args.rollout_engine, args.vllm_kwargs, args.sample_ahead)  # type: ignore[arg-type]  # parsed by now
    tokenizer = pair.tokenizer or student_tokenizer(student, args)
    tokenizer = models.with_pad_token(getattr(tokenizer, "tokenizer", tokenizer))
    other = pair.teacher_tokenizer or loading.teacher_tokenizer(teacher, tokenizer, args)
    pair = dataclasses.replace(pair, tokenizer=tokenizer, teacher_tokenizer=other)
    renders, why_no_chat = loading.rendering_tokenizer(pair, args)
    wants = dataclasses.replace(wants, teacher_tokenizer=renders, why_no_chat=why_no_chat)
    wants = dataclasses.replace(wants, other=loading.other_tokenizer(pair, args))
    loading.compare_vocabularies(pair, args)
    return Ready(given, pair, wants, config)


def _plain(given: Given) -> Given:
    """The same, with datasets of plain values (see `plain_dataset`)."""

    def plain(dataset: Any, name: str) -> Any:
        if isinstance(dataset, dict) and name == "eval":
            return {key: plain(part, key) for key, part in dataset.items()}
        return None if dataset is None else plain_dataset(dataset, name=name)

    text = plain(given.text, "pretraining")
    return dataclasses.replace(
        given, train=plain(given.train, "train"), evaluation=plain(given.evaluation, "eval"), text=text
    )


def _check_parallelism(args: DistillConfig) -> None:
    config = args.parallelism_config
    if config is not None and any(getattr(config, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp")):
        raise ConfigurationError(
            "Got a parallelism_config with tensor, context or sequence parallelism; expected data parallelism only "
            "(DDP, ZeRO, FSDP2): the loss needs whole rows of tokens."
        )


def _check_folders(args: DistillConfig, trains: bool) -> None:
    """Refuse folders that nothing could be written into at the end of the first hour; caches may only be read."""
    for name in ("output_dir", "completions_dir", "teacher_cache", "reference_logps_dir"):
        folder = getattr(args, name, None)
        if folder is not None and args.should_save:
            check_folder(name, folder, writable=trains and (name == "output_dir" or not os.path.isdir(folder)))


def _check_packing(args: DistillConfig, wants: Requirements) -> None:
    if args.packing and args.why_no_packing:
        raise ConfigurationError(
            f"Got `packing: true` with {wants.trainer}, where {args.why_no_packing}; expected training on given "
            "completions, token by token, as GKD with `lmbda: 0`. Set `packing: false`."
        )
    if args.packing and args.max_length is None:
        raise ConfigurationError(
            "Got `packing: true` without `max_length`; expected the length that rows are packed to."
        )


def _check_view(args: DistillConfig, teacher: type[Teacher]) -> None:
    for name in ("teacher_system_prompt", "teacher_prompt", "teacher_max_length"):
        if teacher.is_nobody and getattr(args, name) is not None:
            raise ConfigurationError(
                f"Got `{name}: {shown(getattr(args, name))}` without a teacher, who alone would read it. Name a "
                "teacher, or leave it out."
            )


def _check_teachers(args: DistillConfig, wants: Requirements) -> None:
    if wants.teachers and args.why_one_teacher:
        raise ConfigurationError(
            f"Got several teachers ({', '.join(wants.teachers)}) with {wants.trainer}, where {args.why_one_teacher}; "
            "expected one for all rows. Leave that setting out, compose them (`teacher_mix`), or name one."
        )


def _check_models(given: Given) -> None:
    args, student = given.args, given.pair.student
    if student is None:
        raise ConfigurationError("Got no student model; expected a folder, a Hub id or a model.")
    if given.quantized:
        models.refuse_two_quantizations(args.model_init_kwargs or {}, "model_init_kwargs")  # type: ignore[arg-type]
    if isinstance(student, str):
        models.check_model_source(student, "student")
    elif given.quantized or args.model_init_kwargs:
        raise ConfigurationError(
            "`quantization_config` and `model_init_kwargs` act while a student is loaded by name, but `model` is "
            f"already a {type(student).__name__}. Pass its name, or leave them out."
        )
    for _, member in loading.each_teacher(given.pair.teacher, args):
        if isinstance(member.given, str) and loading.has_files(member.given, member.options):
            models.check_model_source(member.given, "teacher")


def _check_files(pair: Pair, config: Any, args: DistillConfig) -> None:
    student = pair.student
    if isinstance(student, str):
        models.check_files(student, "student", config, args.model_init_kwargs or {})  # type: ignore[arg-type]  # parsed
    for _, member in loading.each_teacher(pair.teacher, args):
        teacher, options = member.given, member.options
        if isinstance(teacher, str) and loading.has_files(teacher, options):
            kwargs: Any = options.teacher_model_init_kwargs or {}
            known = models.with_overrides(models.load_config(teacher, "teacher", **options.files_of("teacher")), kwargs)
            models.check_files(teacher, "teacher", known, kwargs)


def _config_of(teacher: Any, args: DistillConfig) -> Any:
    if isinstance(teacher, str):
        return models.load_config(teacher, "teacher", **args.files_of("teacher"))
    model = loading.model_of(teacher)
    assert model is not None  # a kind that shows its layers
    return models.causal_lm_of(model).config


def _check_architecture(config: Any, teacher: Any, args: DistillConfig, wants: Requirements) -> None:
    if not wants.encoder_decoder:
        return
    if not wants.accepts_encoder_decoders:
        raise ConfigurationError(
            f"The student is an encoder-decoder ({config.model_type}), which this method cannot train; expected a "
            "causal LM. Encoder-decoders are for `method: rationale` with `objective: step_by_step`."
        )
    if getattr(config, "output_router_logits", False):
        raise ConfigurationError(
            f"Got `output_router_logits: true` in the config of the student ({config.model_type}), which asks for a "
            "loss that balances its experts; for an encoder-decoder there is none here. Set it to false, or take a "
            "causal LM."
        )
    if not loading.kind_of(teacher, args).is_nobody:
        raise ConfigurationError(
            f"The student is an encoder-decoder ({config.model_type}) and there is a teacher: their tokens do not lie "
            "in the same places. Leave the teacher out (`distill_weight: 0`), or take a causal LM as student."
        )


def _refuse_shared_weights(student: Any, teacher: Any) -> None:
    frozen = loading.model_of(teacher)
    if not isinstance(student, nn.Module) or frozen is None:
        return
    shared = {id(p) for p in student.parameters()} & {id(p) for p in frozen.parameters()}
    if shared:
        raise ConfigurationError(
            f"Student and teacher are the same model, or share {len(shared)} of their parameters (as an adapter "
            "and the base it was put on do), and the teacher's are frozen. Pass a copy as `teacher_model` "
            "(`copy.deepcopy(model)`, before it gets an adapter), or its name."
        )


def _refuse_weights_without_values(model: Any, role: str) -> None:
    """Refuse what torch refuses later, in words that name no model: weights on `meta`, or made to infer alone."""
    if not isinstance(model, nn.Module):
        return
    for name, weight in model.named_parameters():
        if weight.is_meta and not getattr(model, "hf_device_map", None):  # accelerate fetches what it has put away
            raise ConfigurationError(
                f"The {role}'s weight {name!r} is on the device `meta`, without values; expected a loaded model. Load "
                "it with `from_pretrained`, without `init_empty_weights`."
            )
        if role == "student" and weight.is_inference():
            raise ConfigurationError(
                f"The student's weight {name!r} was made under `torch.inference_mode`, so that no gradient can flow "
                "through it; expected one that trains. Load or build the model outside of it."
            )


def _check_datasets(given: Given, wants: Requirements) -> None:
    args, evaluation = given.args, given.evaluation
    if given.train is None and evaluation is None:
        raise DatasetError("Got neither `train_dataset` nor `eval_dataset`; expected at least one of them.")
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy != "no" and evaluation is None:
        raise DatasetError(f"Got `eval_strategy: {strategy}` but no `eval_dataset`; pass one or set 'no'.")
    teacher = given.pair.teacher
    kinds, writes = loading.kinds_of(teacher, args), loading.may_write(teacher, args)
    held_out_checks.check(args, evaluation, kinds, wants, teacher_writes=writes)
    if not given.own_scores:
        check_best_metric(args, evaluation, wants.teachers, loading.told_by(teacher, args))
    args.check_datasets(given.train, evaluation, given.text, wants)
    check_token_rows(args, wants, given.text is not None and getattr(args, "pretraining_weight", 0) > 0)
