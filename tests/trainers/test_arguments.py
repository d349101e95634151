"""The constructor's arguments: each of those of transformers and TRL acts, or is refused by name with what to write."""

from __future__ import annotations

import inspect
import typing
import warnings
from dataclasses import fields

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import BitsAndBytesConfig, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import distill_trainers
from distill_trainers import DPKDTrainer, GKDConfig, GKDTrainer, MiniLLMTrainer, RationaleTrainer
from distill_trainers.exceptions import ConfigurationError, DatasetError
from distill_trainers.toy import addition_dataset, addition_rows
from distill_trainers.trainers import METHODS
from distill_trainers.trainers.base import DistillTrainer
from distill_trainers.trainers.given.arguments import ELSEWHERE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl
    from trl.experimental.gkd import GKDTrainer as TrlGKDTrainer

TRAINERS = [trainer for _, trainer in METHODS.values()]
THEIRS = [Trainer, trl.SFTTrainer, trl.DPOTrainer, trl.DistillationTrainer, TrlGKDTrainer, trl.GRPOTrainer]
THEIRS += [trl.RLOOTrainer, trl.RewardTrainer]


def _parameters(cls):
    return [p for p in inspect.signature(cls.__init__).parameters.values() if p.name not in ("self", "unknown")]


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was loaded")

    for name in ("load_causal_lm", "load_tokenizer", "load_config"):
        monkeypatch.setattr(distill_trainers.models, name, refuse)


# ---- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda cls: f"{cls.__module__.partition('.')[0]}.{cls.__name__}")
def test_each_argument_of_other_trainers_is_taken_or_refused_with_a_remedy(theirs, nothing_loads):
    taken = {p.name for trainer in TRAINERS for p in _parameters(trainer)}
    for parameter in _parameters(theirs):
        if parameter.name in taken:
            continue
        with pytest.raises(ConfigurationError, match=f"GKDTrainer has no argument `{parameter.name}`") as error:
            GKDTrainer("student", "teacher", **{parameter.name: object()})
        assert ELSEWHERE[parameter.name] in str(error.value)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_arguments_of_old_are_refused_by_the_name_of_the_called_class(trainer, nothing_loads):
    for name in ELSEWHERE.keys() - {p.name for p in _parameters(trainer)}:
        with pytest.raises(ConfigurationError, match=f"^{trainer.__name__} has no argument `{name}`: "):
            trainer("student", "teacher", **{name: object()})


@pytest.mark.parametrize(
    "argument, words",
    [
        ("learning_rate", r"write `args=GKDConfig\(learning_rate=…\)`"),
        ("lmbda", r"write `args=GKDConfig\(lmbda=…\)`"),
        ("peft_confg", "did you mean peft_config"),
        ("train_data", "did you mean train_dataset"),
        ("max_seq_length", "set `max_length` in the config"),
        ("zzz", "expected some of model, teacher_model, args"),
    ],
)
def test_unknown_arguments_say_what_to_write(argument, words, nothing_loads):
    with pytest.raises(ConfigurationError, match=words):
        GKDTrainer("student", "teacher", **{argument: 1})


def test_arguments_given_twice_or_in_excess_are_refused(nothing_loads):
    with pytest.raises(ConfigurationError, match="GKDTrainer got arguments that do not go together: multiple values"):
        GKDTrainer("student", "teacher", model="other")
    with pytest.raises(ConfigurationError, match="too many positional arguments"):
        GKDTrainer(*["x"] * 40)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"model": "student", "model_init": lambda: "student"}, "both `model` and `model_init`"),
        ({"model_init": lambda: "student", "optimizers": (object(), None)}, "both `optimizers` and `model_init`"),
        (
            {"model": "s", "optimizers": (object(), None), "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})},
            "both `optimizers` and `optimizer_cls_and_kwargs`",
        ),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(arguments, words, nothing_loads):
    with pytest.raises(ConfigurationError, match=words):
        GKDTrainer(**arguments)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_signatures_show_the_parameters(trainer):
    shown = _parameters(trainer)
    names = [parameter.name for parameter in shown]
    assert names[:6] == [p.name for p in _parameters(trl.DistillationTrainer)][:6]
    assert {p.name for p in _parameters(Trainer)} - set(names) == {"compute_loss_func"}
    assert ("pretraining_dataset" in names) == (trainer is MiniLLMTrainer)
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in shown)
    assert not {p.kind for p in shown} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_types_of_the_parameters_can_be_read(trainer):
    assert typing.get_type_hints(trainer.__init__) and typing.get_type_hints(DistillTrainer.__init__)["peft_config"]
    assert typing.get_type_hints(trainer.config_class)["max_length"]


def test_a_subclass_with_arguments_of_its_own_shows_both():
    class Mine(RationaleTrainer):
        def __init__(self, *args, shade: str = "blue", **kwargs):
            super().__init__(*args, **kwargs)

    assert [p.name for p in _parameters(Mine)] == [*(p.name for p in _parameters(RationaleTrainer)), "shade"]


@pytest.mark.parametrize("config", [config for config, _ in METHODS.values()])
def test_configs_list_their_settings(config):
    listed = inspect.getdoc(config).partition("\nArgs:\n")[2]
    declared = {n for base in config.__mro__ for n in vars(base).get("__annotations__", {})
                if base.__module__.startswith("distill_trainers")}  # fmt: skip
    own = [field.name for field in fields(config) if field.name in declared]
    assert own and not [name for name in own if f"    {name}: " not in listed]


# ---- Kinds ----------------------------------------------------------------------------------------------------------

WRONG = [
    ("model", 3, "type int as `model`; expected a folder, a Hub id, or a model"),
    ("model", {"name": "x"}, "type dict as `model`"),
    ("model", torch.nn.Linear(2, 2), "type Linear as `model`"),
    ("model", torch.nn.Linear, "the class Linear as `model`.*Pass an instance"),
    ("teacher_model", 3, "type int as `teacher_model`"),
    ("teacher_model", ["a", "b"], "type list as `teacher_model`"),
    ("teacher_model", torch.nn.Linear(2, 2), "type Linear as `teacher_model`.*Did you mean `model=`"),
    ("teacher_model", TrainingArguments(output_dir="x"), "`teacher_model`.*Did you mean `args=`"),
    ("args", {"lmbda": 1.0}, "type dict as `args`"),
    ("processing_class", "gpt2", "type str as `processing_class`; expected a tokenizer"),
    ("teacher_processing_class", 3, "type int as `teacher_processing_class`"),
    ("data_collator", "pad", "type str as `data_collator`"),
    ("data_collator", distill_trainers.data.DistillCollator, "the class DistillCollator as `data_collator`"),
    ("callbacks", EarlyStoppingCallback(), "type EarlyStoppingCallback as `callbacks`; expected a list"),
    ("callbacks", [print], "type list as `callbacks`; expected a list of TrainerCallbacks"),
    ("optimizers", torch.optim.SGD, "the class SGD as `optimizers`; expected a pair"),
    ("optimizer_cls_and_kwargs", torch.optim.SGD, "the class SGD as `optimizer_cls_and_kwargs`"),
    ("optimizer_cls_and_kwargs", (torch.optim.SGD, 0.1), "type tuple as `optimizer_cls_and_kwargs`"),
    ("peft_config", {"r": 4}, "type dict as `peft_config`; expected a PeftConfig"),
    ("peft_config", LoraConfig, "the class LoraConfig as `peft_config`"),
    ("quantization_config", "4bit", "type str as `quantization_config`"),
    ("quantization_config", LoraConfig(), "`quantization_config`.*Did you mean `peft_config=`"),
    ("formatting_func", "text", "type str as `formatting_func`; expected a function"),
    ("compute_metrics", "accuracy", "type str as `compute_metrics`"),
    ("preprocess_logits_for_metrics", 1, "type int as `preprocess_logits_for_metrics`"),
]


@pytest.mark.parametrize("argument, value, words", WRONG, ids=lambda value: str(value)[:30])
def test_arguments_of_the_wrong_kind_are_refused_before_anything_loads(argument, value, words, nothing_loads):
    arguments = {"model": "student", "teacher_model": "teacher", argument: value}
    with pytest.raises(ConfigurationError, match=f"^GKDTrainer got .*{words}"):
        GKDTrainer(**arguments, train_dataset=addition_dataset(2))


def test_each_argument_has_a_kind():
    """So that a new one cannot be forgotten; datasets and rewards have refusals of their own."""
    from distill_trainers.trainers.given.arguments import KINDS

    assert {p.name for p in _parameters(GKDTrainer)} - KINDS.keys() == {
        "train_dataset",
        "eval_dataset",
        "reward_funcs",
    }


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("rows", ["data.jsonl", 3, addition_dataset, np.arange(3), pandas.DataFrame({"prompt": ["1"]})])
def test_datasets_of_the_wrong_kind_are_refused(make_trainer, make_student, tokenizer, name, rows):
    arguments = {"train_dataset": addition_dataset(4), name: rows}
    with pytest.raises(DatasetError, match="expected datasets.Dataset"):
        GKDTrainer(make_student(), make_student(seed=3), processing_class=tokenizer, **arguments)


def test_a_call_in_the_order_of_another_trainer_is_refused(make_student, make_teacher, tokenizer, nothing_loads):
    """`Trainer(model, args, …)`, and TRL's `GKDTrainer(model, teacher, args, data_collator, train_dataset)`."""
    args = GKDConfig(output_dir="x")
    with pytest.raises(ConfigurationError, match="Did you mean `args=`"):
        GKDTrainer(make_student(), args)
    collator = distill_trainers.data.DistillCollator(0)
    with pytest.raises(DatasetError, match="is a DistillCollator, expected datasets.Dataset"):
        GKDTrainer(make_student(), make_teacher(), args, collator, addition_dataset(4), processing_class=tokenizer)


def test_paths_and_dictionaries_of_splits_are_taken(saved, tmp_path):
    from pathlib import Path

    parts = DatasetDict({"easy": addition_dataset(4), "hard": addition_dataset(4, seed=3)})
    args = GKDConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", max_length=24, lmbda=0.0)
    trainer = GKDTrainer(Path(saved.student), Path(saved.teacher), args, addition_dataset(8), parts)
    assert {"eval_easy_loss", "eval_hard_loss"} <= trainer.evaluate().keys()
    assert trainer.teacher.name == saved.teacher


# ---- What acts ------------------------------------------------------------------------------------------------------


def test_an_optimizer_by_class_takes_its_own_arguments(make_trainer, make_student, batch_of):
    """The right value: w − lr · gradient, written out."""
    trainer = make_trainer(
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}),
        max_steps=1,
        lmbda=0.0,
        max_grad_norm=0.0,
        weight_decay=0.0,
        train_sampling_strategy="sequential",
    )
    reference = make_trainer(lmbda=0.0)
    reference.model.train()
    reference.compute_loss(reference.model, batch_of(reference, range(4))).backward()
    expected = {name: p.detach() - 0.5 * p.grad for name, p in reference.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)


def _logits_of(trainer, rows):
    """Of each row alone, without padding."""
    with torch.no_grad():
        return [trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].numpy() for row in rows]


def test_metrics_are_computed_from_logits_and_labels(make_trainer):
    """The right value: accuracy of the next token, from forwards of single rows."""
    seen = []

    def accuracy(prediction):
        seen.append(prediction)
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"token_accuracy": right[prediction.label_ids[:, 1:] != -100].mean()}

    plain = make_trainer(eval_dataset=addition_dataset(6, seed=5), per_device_eval_batch_size=4)
    settings = {"eval_dataset": addition_dataset(6, seed=5), "per_device_eval_batch_size": 4}
    trainer = make_trainer(compute_metrics=accuracy, **settings)
    metrics, without = trainer.evaluate(), plain.evaluate()
    rows = list(trainer.eval_dataset)
    logits = _logits_of(trainer, rows)
    hits = []
    for row, values in zip(rows, logits, strict=True):
        start = row["prompt_length"]
        hits += [values[t - 1].argmax() == row["input_ids"][t] for t in range(start, len(row["input_ids"]))]
    assert metrics["eval_token_accuracy"] == pytest.approx(np.mean(hits), abs=1e-12)
    for k, values in enumerate(logits):
        np.testing.assert_allclose(seen[0].predictions[k, : len(values)], values, rtol=1e-4, atol=1e-5)
    same = [name for name in without if name.startswith("eval_") and "per_second" not in name and "time" not in name]
    assert {name: metrics[name] for name in same} == {name: without[name] for name in same}


@pytest.mark.parametrize(
    "settings", [{"eval_accumulation_steps": 1}, {"batch_eval_metrics": True}, {"include_for_metrics": ["inputs"]}]
)
def test_settings_of_metrics_act(make_trainer, settings):
    """Token accuracy is the same whichever way it is gathered, and of argmax as of logits."""
    hits, total, inputs_seen = 0, 0, []

    def accuracy(prediction, compute_result=True):
        nonlocal hits, total
        inputs_seen.append(prediction.inputs)
        guesses, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
        hits, total = hits + (guesses == labels)[labels != -100].sum(), total + (labels != -100).sum()
        return {"token_accuracy": hits / total} if compute_result else {}

    shared = {"eval_dataset": addition_dataset(6, seed=5), "per_device_eval_batch_size": 4}
    expected = make_trainer(compute_metrics=accuracy, preprocess_logits_for_metrics=_argmax, **shared).evaluate()
    hits = total = 0
    trainer = make_trainer(compute_metrics=accuracy, preprocess_logits_for_metrics=_argmax, **shared, **settings)
    assert trainer.evaluate()["eval_token_accuracy"] == expected["eval_token_accuracy"]
    if "include_for_metrics" in settings:
        assert inputs_seen[-1].shape == (6, max(len(row["input_ids"]) for row in trainer.eval_dataset))


def _argmax(logits, labels):
    assert labels.shape == logits.shape[:2]
    return logits.argmax(-1)


def test_a_metric_of_ones_own_takes_the_place_of_ours_and_the_loss_stays(make_trainer, caplog):
    rows = addition_dataset(4, seed=5)
    plain = make_trainer(eval_dataset=rows).evaluate()
    trainer = make_trainer(eval_dataset=rows, compute_metrics=lambda prediction: {"perplexity": 1.5, "loss": 9.0})
    for _ in range(2):
        metrics = trainer.evaluate()
    assert metrics["eval_perplexity"] == 1.5 and metrics["eval_loss"] == plain["eval_loss"]
    assert caplog.text.count("`compute_metrics` returns eval_perplexity") == 1


@pytest.mark.parametrize("made", [None, 3.0, [0.5]])
def test_metrics_that_are_no_dictionary_are_refused(make_trainer, made):
    trainer = make_trainer(eval_dataset=addition_dataset(4), compute_metrics=lambda prediction: made)
    with pytest.raises(ConfigurationError, match=f"returned an object of type {type(made).__name__}"):
        trainer.evaluate()


@pytest.mark.parametrize("method", ["dpkd", "rationale"])
def test_metrics_are_of_one_row_for_each_example(make_trainer, rows_for, method):
    """The chosen response of a pair, and the answer of a question with a rationale."""
    train = rows_for(method)(8)
    if method == "dpkd":
        train = Dataset.from_list([{"prompt": p["prompt"], "chosen": p["completion"], "rejected": "0"}
                                   for p in addition_rows(8, seed=2) if p["completion"] != "0"])  # fmt: skip
    seen = []
    trainer = make_trainer(
        method=method,
        train=train,
        eval_dataset=train,
        compute_metrics=lambda prediction: seen.append(prediction) or {},
        per_device_eval_batch_size=3,
    )
    trainer.evaluate()
    rows = list(trainer.eval_dataset)
    assert len(seen[0].predictions) == len(rows)
    for k, (row, values) in enumerate(zip(rows, _logits_of(trainer, rows), strict=True)):
        np.testing.assert_allclose(seen[0].predictions[k, : len(values)], values, rtol=1e-4, atol=1e-5)
        trained = seen[0].label_ids[k] != -100
        assert seen[0].label_ids[k][trained].tolist() == row["input_ids"][row["prompt_length"] :]
    trainer.args.include_for_metrics = ["inputs"]
    with pytest.raises(ConfigurationError, match="include_for_metrics"):
        trainer.evaluate()


def test_callbacks_may_be_classes_or_instances(make_trainer):
    class Counts(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            Counts.steps += 1

    class Other(Counts):
        pass

    make_trainer(callbacks=[Counts, Other()], max_steps=2).train()
    assert Counts.steps == 4


def test_arguments_may_be_none(make_student, make_teacher, tokenizer, tmp_path):
    """None is what scripts pass for what they do not use."""
    nothing = {p.name: None for p in _parameters(GKDTrainer) if p.name not in ("model", "train_dataset")}
    nothing |= {"teacher_model": make_teacher(), "processing_class": tokenizer}
    args = GKDConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=24, max_steps=1, lmbda=0.0)
    trainer = GKDTrainer(make_student(), train_dataset=addition_dataset(4), **{**nothing, "args": args})
    assert trainer.train().global_step == 1


def test_a_quantization_may_be_given_in_one_place_only(saved, nothing_loads):
    args = GKDConfig(output_dir="x", model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)})
    with pytest.raises(ConfigurationError, match="both as `quantization_config` and in `model_init_kwargs`"):
        GKDTrainer(
            saved.student,
            saved.teacher,
            args,
            addition_dataset(4),
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        )


# ---- formatting_func ------------------------------------------------------------------------------------------------

SOURCE = Dataset.from_list([{"a": row["prompt"], "b": row["completion"]} for row in addition_rows(8, seed=0)])


def _of_a_batch(rows):
    return [a + b for a, b in zip(rows["a"], rows["b"], strict=True)]


@pytest.mark.parametrize(
    "function, right",
    [
        (lambda row: row["a"] + row["b"], lambda row: {"text": row["a"] + row["b"]}),
        (_of_a_batch, lambda row: {"text": row["a"] + row["b"]}),
        (lambda row: {"prompt": row["a"], "completion": row["b"]},) * 2,
    ],
    ids=["text", "list of texts", "row"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_rows_are_written_by_a_function(make_trainer, function, right, stream):
    """The right value: what `dataset.map` gives, tokenised."""
    expected = make_trainer(train=SOURCE.map(right, remove_columns=["a", "b"]), lmbda=0.0)
    rows = SOURCE.to_iterable_dataset() if stream else SOURCE
    trainer = make_trainer(train=rows, eval_dataset={"x": rows}, formatting_func=function, lmbda=0.0)
    assert list(trainer.train_dataset) == list(trainer.eval_dataset["x"]) == list(expected.train_dataset)
    assert trainer.evaluate(rows)["eval_tokens"] == trainer.evaluate()["eval_x_tokens"] > 0


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda row: row["text"], "fails on the first row of dataset 'train', whose columns are .'a', 'b'.*KeyError"),
        (lambda row: 3, "returned an object of type int for a row"),
        (lambda row: ["one text"], "returned a list for the first row of dataset 'train'"),
        (lambda rows: ["two texts"] * min(2, len(rows["a"])), "returned 2 values for a batch of 8 rows"),
        (lambda rows: [1] * len(rows["a"]), "expected a list with one text for each row"),
    ],
)
def test_a_function_that_writes_no_rows_is_refused(make_trainer, function, words):
    with pytest.raises(ConfigurationError, match=words):
        make_trainer(train=SOURCE, formatting_func=function)


def _adds_a_column(row):
    row["text"] = row["a"] + row["b"]
    return row


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_may_change_the_row_that_it_is_given(make_trainer, stream):
    """Its other columns are of no layout, and do not stand in the way."""
    rows = SOURCE.to_iterable_dataset() if stream else SOURCE
    trainer = make_trainer(train=rows, formatting_func=_adds_a_column, lmbda=0.0)
    right = make_trainer(train=[{"text": row["a"] + row["b"]} for row in SOURCE], lmbda=0.0)
    assert [row["input_ids"] for row in trainer.train_dataset] == [row["input_ids"] for row in right.train_dataset]


@pytest.mark.parametrize("count", [1, 8])
def test_a_list_of_one_text_for_a_row_is_refused(make_trainer, count):
    """As a batch of one row it would go through, with the brackets of the list in its text."""
    with pytest.raises(ConfigurationError, match="returned a list for the first row of dataset 'train'"):
        make_trainer(train=SOURCE.select(range(count)), formatting_func=lambda row: [f"{row['a']}{row['b']}"])


def test_a_function_for_rows_that_are_tokenised_is_refused(make_trainer):
    rows = make_trainer().train_dataset
    with pytest.raises(ConfigurationError, match="tokenised already"):
        make_trainer(train=rows, formatting_func=lambda row: "text")


def test_preferences_are_written_by_a_function(make_trainer):
    rows = addition_rows(8, seed=2)
    source = Dataset.from_list([{"q": row["prompt"], "good": row["completion"], "bad": "x"} for row in rows])
    trainer = make_trainer(
        method="dpkd",
        train=source,
        formatting_func=lambda row: {"prompt": row["q"], "chosen": row["good"], "rejected": "0" + row["good"]},
    )
    assert isinstance(trainer, DPKDTrainer) and "rejected_ids" in trainer.train_dataset.column_names
