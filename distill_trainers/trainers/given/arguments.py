"""What a trainer's constructor is given: which arguments there are, of which kind, and what to write for all others."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, TrainingArguments
from transformers.utils.quantization_config import QuantizationConfigMixin

from ... import models
from ...data.formats import first_row
from ...data.plain import plain_dataset
from ...exceptions import ConfigurationError
from ...teachers import Teacher

_REWARD = "write `reward_funcs=`, with a function that asks yours (GKDTrainer, MiniLLMTrainer)"
_NO_TOOLS = "completions are sampled without tools or an environment; give rows that have the tool calls"
# Arguments of other trainers, of `transformers` and of TRL, that are none here: what to write instead.
ELSEWHERE = {
    "compute_loss_func": (
        "the loss is the method's, taken inside the student's head. The cross-entropy is `lm_loss_weight` in the "
        "config; a loss of your own is a method (docs/adding_a_method.md)"
    ),
    "tokenizer": "write `processing_class=`",
    "teacher_tokenizer": "write `teacher_processing_class=`",
    "model_name_or_path": "write `model=`, which takes a name too",
    "teacher_model_name_or_path": "write `teacher_model=`, which takes a name too",
    "ref_model": (
        "write `teacher_model=`, which is the reference of DPKDTrainer; for the student as it was before training, as "
        "in DPO, set `reference='student'` in DPKDConfig"
    ),
    "pretraining_dataset": "it is an argument of MiniLLMTrainer",
    "max_seq_length": "set `max_length` in the config",
    "max_prompt_length": "set `max_length` in the config; a prompt loses its beginning where both do not fit",
    "dataset_text_field": "set `column_mapping={'your column': 'text'}` in the config",
    "reward_funcs": "it is an argument of GKDTrainer and MiniLLMTrainer",
    "reward_processing_classes": _REWARD,
    "reward_model": _REWARD,
    "value_model": _REWARD,
    "judge": _REWARD,
    "tools": _NO_TOOLS,
    "environment_factory": _NO_TOOLS,
    "rollout_func": "set `rollout_engine` in the config: decode, hf or vllm",
    "rollout_worker": "set `rollout_engine` in the config: decode, hf or vllm",
}


class Kind(NamedTuple):
    """What an argument may be: the test of it, and its words."""

    fits: Callable[[Any], bool]
    expected: str


def _is_model(value: Any) -> bool:
    """A model of transformers in any wrappers, or one of the user's own with such a config."""
    return isinstance(value, nn.Module) and hasattr(
        getattr(models.causal_lm_of(value), "config", None), "get_text_config"
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_callback(value: Any) -> bool:
    return isinstance(value, TrainerCallback) or (isinstance(value, type) and issubclass(value, TrainerCallback))


def _is_adapter(value: Any) -> bool:
    from peft import PeftConfig

    return isinstance(value, PeftConfig)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def takes_trial(value: Any) -> bool | None:
    """Tell whether a `model_init` is called with the trial; None where it is none at all.

    With it, as in transformers, if it has one parameter; also if the trial is all it needs, or its first is so called.
    """
    if not callable(value) or isinstance(value, nn.Module):
        return None
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):  # functions of C that do not tell
        return None
    one = inspect.Parameter
    needed = [p for p in parameters if p.default is one.empty and p.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    places = [p for p in parameters if p.kind not in (one.KEYWORD_ONLY, one.VAR_KEYWORD)]
    if needed:
        return True if needed == places[:1] else None
    return bool(places) and (len(parameters) == 1 or places[0].name == "trial")


def made_by(model_init: Any, trial: Any) -> Any:
    """Call a `model_init`, with the trial if it takes one."""
    return model_init(trial) if takes_trial(model_init) else model_init()


_TOKENIZER = Kind(
    lambda value: isinstance(value, PreTrainedTokenizerBase | ProcessorMixin),
    "a tokenizer, as `AutoTokenizer.from_pretrained` gives it",
)
_FUNCTION = Kind(callable, "a function")
KINDS = {
    "model": Kind(lambda value: _is_name(value) or _is_model(value), "a folder, a Hub id, or a model of transformers"),
    "teacher_model": Kind(
        lambda value: _is_name(value) or _is_model(value) or isinstance(value, Teacher | Mapping),
        "a folder, a Hub id, a server's address, a model of transformers, a Teacher, or several of them by name",
    ),
    "args": Kind(lambda value: isinstance(value, TrainingArguments), "the method's config"),
    "processing_class": _TOKENIZER,
    "teacher_processing_class": _TOKENIZER,
    "data_collator": Kind(
        lambda value: callable(value) and not isinstance(value, type), "a function of rows, or a collator's instance"
    ),
    "callbacks": Kind(
        lambda value: isinstance(value, list | tuple) and all(map(_is_callback, value)), "a list of TrainerCallbacks"
    ),
    "optimizers": Kind(_is_pair, "a pair (optimizer, scheduler), either of which may be None"),
    "optimizer_cls_and_kwargs": Kind(
        lambda value: _is_pair(value) and callable(value[0]) and isinstance(value[1], Mapping),
        "a pair of an optimizer's class and its arguments, such as (torch.optim.SGD, {'lr': 0.1})",
    ),
    "peft_config": Kind(_is_adapter, "a PeftConfig, such as LoraConfig(r=16)"),
    "quantization_config": Kind(
        lambda value: isinstance(value, QuantizationConfigMixin | Mapping),
        "a quantization config of transformers, such as BitsAndBytesConfig(load_in_4bit=True)",
    ),
    "formatting_func": _FUNCTION,
    "compute_metrics": _FUNCTION,
    "preprocess_logits_for_metrics": _FUNCTION,
    "model_init": Kind(
        lambda value: takes_trial(value) is not None and not (isinstance(value, type) and issubclass(value, nn.Module)),
        "a function of no argument, or of the trial, that returns a student",
    ),
}
# Where one of the wrong kind belongs; also what is left of a call written in another trainer's order.
_BELONGS = (
    (lambda value: isinstance(value, TrainingArguments), "args"),
    (lambda value: isinstance(value, PreTrainedTokenizerBase), "processing_class"),
    (lambda value: _is_adapter(value), "peft_config"),
    (lambda value: type(value).__module__.startswith("datasets."), "train_dataset"),
    (lambda value: isinstance(value, nn.Module), "model"),
    (lambda value: callable(value) and "ollat" in getattr(type(value), "__name__", ""), "data_collator"),
)
_EXCLUSIVE = (
    ("model", "model_init", "`model_init` makes the student anew for each call of `train`; `model` is one student"),
    ("optimizers", "model_init", "the optimizer would hold an old student's weights; use `optimizer_cls_and_kwargs`"),
    ("optimizers", "optimizer_cls_and_kwargs", "both say which optimizer trains"),
)


def plain(model: Any) -> Any:
    """Return a path as text, as models are named; all else as it is."""
    return os.fspath(model) if isinstance(model, os.PathLike) else model


def checked(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor refuse, before its first line, arguments that it does not have or that are of a wrong kind.

    Raises:
        ConfigurationError: which argument, what it was, and what to write.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError as error:
            raise ConfigurationError(f"{name} got arguments that do not go together: {error}.") from error
        refuse_unknown(type(self), given.get("unknown", {}))
        given = {argument: value for argument, value in given.items() if value is not None}
        if _is_pair(given.get("optimizers")) and all(part is None for part in given["optimizers"]):
            del given["optimizers"]
        for argument in KINDS.keys() & given.keys():
            check_kind(name, argument, given[argument])
        for one, other, reason in _EXCLUSIVE:
            if one in given and other in given:
                raise ConfigurationError(f"{name} got both `{one}` and `{other}`: {reason}. Leave one of them out.")
        init(self, *args, **kwargs)

    return constructor


def check_kind(trainer: str, argument: str, value: Any, of: str = "") -> None:
    """Refuse an argument of the wrong kind.

    Args:
        of: who gave it, where that is not the caller.
    """
    kind = KINDS[argument]
    if kind.fits(value):
        return
    what = f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"
    belongs = next((place for is_one, place in _BELONGS if place != argument and is_one(value)), None)
    hint = "Pass an instance of it." if isinstance(value, type) else f"Pass {kind.expected.partition(',')[0]}."
    hint = (
        f"Did you mean `{belongs}=`? Name the arguments, as their order differs between trainers." if belongs else hint
    )
    raise ConfigurationError(f"{trainer} got {what} as `{of or argument}`; expected {kind.expected}. {hint}")


def refuse_unknown(trainer: Any, given: Mapping[str, Any]) -> None:
    """Refuse arguments that a trainer's constructor does not have, by the name of the class that the user called."""
    known = [name for name in inspect.signature(trainer.__init__).parameters if name not in ("self", "unknown")]
    config = trainer.config_class
    settings = [field.name for field in dataclasses.fields(config)]
    for argument in given:
        if argument in settings:
            hint = f"it is a setting: write `args={config.__name__}({argument}=…)`"
        elif argument in ELSEWHERE:
            hint = ELSEWHERE[argument]
        else:
            close = difflib.get_close_matches(argument, [*known, *settings], n=3)
            hint = f"did you mean {' or '.join(close)}" if close else f"expected some of {', '.join(known)}"
        raise ConfigurationError(f"{trainer.__name__} has no argument `{argument}`: {hint}.")


def show_parameters(trainer: type) -> None:
    """Show in `help` and `inspect` what an `__init__` with `**kwargs` hands on to that of its parent."""
    init: Any = vars(trainer).get("__init__")
    if init is None:
        return
    own = list(inspect.signature(init).parameters.values())
    kinds = inspect.Parameter
    if all(parameter.kind != kinds.VAR_KEYWORD for parameter in own):
        return
    variadic = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    names = {parameter.name for parameter in own if parameter.kind not in variadic}
    parent: Any = super(trainer, trainer)  # the next in the order of resolution
    parents = list(inspect.signature(parent.__init__).parameters.values())
    inherited = [p for p in parents if p.name not in names and p.kind != kinds.VAR_KEYWORD]
    if all(parameter.kind != kinds.VAR_POSITIONAL for parameter in own):
        inherited = [parameter.replace(kind=kinds.KEYWORD_ONLY) for parameter in inherited]
    shown = [p for p in own if p.kind not in variadic] + inherited
    shown += [p for p in parents if p.kind == kinds.VAR_KEYWORD]
    init.__signature__ = inspect.Signature(sorted(shown, key=lambda p: p.kind))


# ---- Rows by a function ---------------------------------------------------------------------------------------------


def formatted(dataset: Any, formatting_func: Callable[[Any], Any] | None, name: str) -> Any:
    """Return rows as `formatting_func` writes them: of a row, or of a batch of rows, as in TRL.

    It returns a text, which becomes a row of the layout `text`; a mapping, which becomes the row; or, of a batch (a
    mapping of lists), a list with a text for each row. The first row tells which.

    Raises:
        ConfigurationError: it fails on the first row, or returns something else.
    """
    if formatting_func is None or dataset is None:
        return dataset
    if isinstance(dataset, Mapping):
        return {part: formatted(rows, formatting_func, part) for part, rows in dataset.items()}
    dataset = plain_dataset(dataset, name=name)
    row = first_row(dataset, name=name)
    if "input_ids" in row:
        raise ConfigurationError(
            f"Got `formatting_func` with dataset {name!r}, whose rows are tokenised already. Leave it out."
        )
    columns = list(row)
    is_batched = _takes_batches(formatting_func, row, name)
    work = functools.partial(_format_rows if is_batched else _format_row, formatting_func, name)
    return dataset.map(work, batched=is_batched, remove_columns=columns)


def _takes_batches(formatting_func: Callable[[Any], Any], row: Mapping[str, Any], name: str) -> bool:
    try:
        if not isinstance(formatting_func(dict(row)), list):
            return False
        with contextlib.suppress(Exception):
            if len(formatting_func({column: [value, value] for column, value in row.items()})) == 2:
                return True
    except Exception as error:  # whatever a user's function raises
        with contextlib.suppress(Exception):
            if isinstance(formatting_func({column: [value] for column, value in row.items()}), list):
                return True
        raise ConfigurationError(
            f"`formatting_func` fails on the first row of dataset {name!r}, whose columns are {sorted(row)}: "
            f"{type(error).__name__}: {error}. It is given a row, and returns a text."
        ) from error
    raise ConfigurationError(
        f"`formatting_func` returned a list for the first row of dataset {name!r}, and of two rows not two texts; "
        "expected a text for a row, or for a batch (a mapping of lists) a list of texts."
    )


def _format_row(formatting_func: Callable[[Any], Any], name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    made = formatting_func(row)
    if isinstance(made, str):
        return {"text": made}
    if isinstance(made, Mapping):
        return dict(made)
    raise ConfigurationError(
        f"`formatting_func` returned an object of type {type(made).__name__} for a row of dataset {name!r}; expected a "
        "text, or the row as a mapping (for a batch: a list of texts)."
    )


def _format_rows(formatting_func: Callable[[Any], Any], name: str, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    made, count = formatting_func(rows), len(next(iter(rows.values())))
    if not isinstance(made, list) or len(made) != count or not all(isinstance(text, str) for text in made):
        what = f"{len(made)} values" if isinstance(made, list) else f"an object of type {type(made).__name__}"
        raise ConfigurationError(
            f"`formatting_func` returned {what} for a batch of {count} rows of dataset {name!r}; expected a list with "
            "one text for each row."
        )
    return {"text": made}


def checked_metrics(compute_metrics: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Let `compute_metrics` refuse what is no dictionary; in the midst of `batch_eval_metrics` nothing is awaited."""
    if compute_metrics is None:
        return None

    @functools.wraps(compute_metrics)
    def metrics(*args: Any, **kwargs: Any) -> Any:
        made = compute_metrics(*args, **kwargs)
        if kwargs.get("compute_result", True) and not isinstance(made, dict):
            raise ConfigurationError(
                f"`compute_metrics` returned an object of type {type(made).__name__}; expected a dictionary of metrics "
                "by name. Return one, such as {'accuracy': 0.5}."
            )
        return made

    return metrics


# ---- Hyperparameter search ------------------------------------------------------------------------------------------


def checked_space(space: Callable[[Any], Any], args: Any) -> Callable[[Any], Any]:
    """Let a search space refuse settings that do not exist, or that act while the trainer is made and never again."""
    fields = {field.name: field for field in dataclasses.fields(args)}
    searched = {field.name for field in dataclasses.fields(TrainingArguments)}

    if not callable(space):
        raise ConfigurationError(
            f"Got an object of type {type(space).__name__} as `hp_space`; expected a function of the trial. Write "
            "`lambda trial: {'learning_rate': trial.suggest_float('learning_rate', 1e-5, 1e-3, log=True)}`."
        )

    def refusing(trial: Any) -> Any:
        given = space(trial)
        if not isinstance(given, Mapping):
            raise ConfigurationError(
                f"`hp_space` returned an object of type {type(given).__name__}; expected settings by name. Return one, "
                "such as {'learning_rate': 1e-4}."
            )
        for name in given.get("parameters", given):
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=3)
                hint = f"Did you mean {' or '.join(close)}?" if close else "Name settings of the config."
                raise ConfigurationError(
                    f"Got `{name}` in `hp_space`, which {type(args).__name__} does not have. {hint}"
                )
            if name not in searched and "float" not in str(fields[name].type):
                raise ConfigurationError(
                    f"Got `{name}` in `hp_space`; expected settings of TrainingArguments, or numbers in the method's "
                    f"loss. `{name}` acts while the trainer is made: make a trainer for each of its values."
                )
        return given

    return refusing
