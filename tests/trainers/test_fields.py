"""Every field of `TrainingArguments` acts, is refused or is said to be ignored; those that may surprise are tried."""

import logging
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from distill_trainers import GKDConfig, MiniLLMConfig
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers.given.fields import ARGUMENTS

PLAIN = {"output_dir": "out", "use_cpu": True, "report_to": "none"}
DEFAULT = []  # the trainer that has trained without any change
EVALUATES = {"eval_dataset": addition_dataset(8, seed=9), "eval_strategy": "steps", "eval_steps": 2}


def test_the_table_has_every_field_of_the_installed_transformers():
    missing = {f.name for f in fields(TrainingArguments)} - ARGUMENTS.keys()
    assert not missing, "try each, and write a row for it in distill_trainers/trainers/given/fields.py"


@pytest.mark.parametrize("name", [name for name, argument in ARGUMENTS.items() if argument.does != "acts"])
def test_what_does_not_act_is_refused_or_said(name, caplog):
    default = next((f.default for f in fields(GKDConfig) if f.name == name), None)
    value = not default if isinstance(default, bool) else 2 if isinstance(default, (int, float)) else ["loss"]
    value = {"label_smoothing_factor": 0.5, "length_column_name": "size", "eval_accumulation_steps": 2}.get(name, value)
    if ARGUMENTS[name].does == "refused":
        with pytest.raises(ConfigurationError, match=f"`{name}: .*expected .*{ARGUMENTS[name].why[:12]}"):
            GKDConfig(**PLAIN, **{name: value})
        return
    GKDConfig(**PLAIN, **{name: value})
    assert f"`{name}: {value}` has no effect" in caplog.text or value in ARGUMENTS[name].only


def test_defaults_say_nothing(caplog):
    """So does a run that evaluates, for which transformers itself sets `do_eval`."""
    GKDConfig(**PLAIN, eval_strategy="epoch", label_names=["labels"])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "config",
    [{"dispatch_batches": True}, {"even_batches": False}],
    ids=str,
)
def test_ways_to_share_batches_that_would_fail_are_refused(config):
    (name,) = config
    with pytest.raises(ConfigurationError, match=f"accelerator_config.{name}"):
        GKDConfig(**PLAIN, accelerator_config=config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr_scheduler_type", "cosin"), ("eval_strategy", "sometimes"), ("optim", "adamv"), ("hub_strategy", "never")],
)
def test_words_are_taken_from_a_list(name, value):
    with pytest.raises(ConfigurationError, match=f"`{name}: {value}`; expected one of"):
        GKDConfig(**PLAIN, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("adam_beta1", 1.0), ("adam_beta2", 1.5)])
def test_decays_of_the_optimiser_are_below_1(name, value):
    with pytest.raises(ConfigurationError, match=f"`{name}: {value}`; expected a number in .0, 1."):
        GKDConfig(**PLAIN, **{name: value})


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture
def against_default(make_trainer):
    """`against_default(**changes)`: a trained trainer without the changes, the same for all tests, and one with."""

    def run(**changes):
        for own in ([] if DEFAULT else [{}]) + [changes]:
            trainer = make_trainer(**{"max_steps": 4, "lmbda": 0.0, **EVALUATES, **own})
            trainer.train()
            if not own:
                DEFAULT.append(trainer)
        return DEFAULT[0], trainer

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"neftune_noise_alpha": 50.0},
        {"train_sampling_strategy": "sequential"},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "batch_rebalance"},
        {"data_seed": 1},
        {"optim": "sgd"},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}},
        {"adam_beta1": 0.1},
        {"bf16": True},
        {"max_grad_norm": 1e-3},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_these_change_what_is_trained(against_default, changes):
    plain, other = against_default(**changes)
    assert losses(plain) != losses(other)[: len(losses(plain))]


@pytest.mark.parametrize(
    "changes",
    [
        {
            "torch_empty_cache_steps": 1,
            "batch_eval_metrics": True,
            "prediction_loss_only": True,
            "include_num_input_tokens_seen": "all",
            "average_tokens_across_devices": False,
            "include_for_metrics": ["inputs", "loss"],
            "eval_accumulation_steps": 1,
            "eval_use_gather_object": True,
            "eval_do_concat_batches": False,
            "use_cache": True,
            "restore_callback_states_from_checkpoint": True,
            "skip_memory_metrics": False,
            "do_train": False,
            "do_predict": True,
            "logging_nan_inf_filter": True,
            "enable_jit_checkpoint": True,
            "auto_find_batch_size": True,
        },
        {"activation_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"accelerator_config": {"split_batches": True, "use_seedable_sampler": False}},
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True},
        {"ddp_find_unused_parameters": True, "ddp_static_graph": True, "ddp_bucket_cap_mb": 1},
        {"full_determinism": True, "debug": "underflow_overflow"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_these_change_nothing_about_it(against_default, changes, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # set, and left behind, by `full_determinism`
    try:
        plain, other = against_default(**changes)
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(plain) == pytest.approx(losses(other), rel=1e-5)
    assert losses(plain, "eval_loss") == pytest.approx(losses(other, "eval_loss"), rel=1e-5)


def test_when_it_is_evaluated(against_default):
    plain, other = against_default(eval_on_start=True, eval_delay=3)
    assert [entry["step"] for entry in plain.state.log_history if "eval_loss" in entry] == [2, 4]
    assert [entry["step"] for entry in other.state.log_history if "eval_loss" in entry] == [0, 4]


def test_the_last_batch_is_dropped_where_that_is_asked_for(make_trainer):
    steps = {}
    for drop in (False, True):
        trainer = make_trainer(lmbda=0.0, num_train_epochs=1, per_device_train_batch_size=5, dataloader_drop_last=drop)
        trainer.train()
        steps[drop] = trainer.state.global_step
    assert steps == {False: 5, True: 4}  # of 24 rows


def test_tokens_seen_are_those_that_were_trained_on(make_trainer):
    """With rollouts, the student's own and not the dataset's."""
    trainer = make_trainer(lmbda=1.0, include_num_input_tokens_seen="non_padding", max_steps=2)
    seen = []
    compute = trainer.compute_loss

    def count(model, inputs, *args, **kwargs):
        seen.append(int(inputs["attention_mask"].sum()))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = count
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(seen)


def test_a_batch_size_is_found_where_memory_is_short(make_trainer):
    """Batches of 4 rows do not fit: the run starts again with fewer, and its losses are finite."""
    trainer = make_trainer(lmbda=0.0, auto_find_batch_size=True, max_steps=3)
    compute, sizes = trainer.compute_loss, []

    def short_of_memory(model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = short_of_memory
    trainer.train()
    assert sizes[0] == 4 and set(sizes[1:]) == {max(sizes[1:])} and max(sizes[1:]) < 4
    assert len(losses(trainer)) == 3 and trainer.state.global_step == 3


def test_rollouts_have_no_noise_of_neftune(make_trainer):
    """The student's text is sampled from the student that will be used."""
    sampled = []
    for alpha in (None, 1e6):
        trainer = make_trainer(lmbda=1.0, neftune_noise_alpha=alpha, max_steps=1, temperature=0.0, learning_rate=0.0)
        sample = trainer.sample_completions
        trainer.sample_completions = lambda batches, *a, s=sample: sampled.append(s(batches, *a)) or sampled[-1]
        trainer.train()
    first, second = sampled
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))


def test_minillm_says_which_arguments_its_counting_excludes():
    for name in ("auto_find_batch_size", "ignore_data_skip"):
        with pytest.raises(ConfigurationError, match=name):
            MiniLLMConfig(**PLAIN, num_inner_epochs=2, **{name: True})


def test_both_names_of_activation_checkpointing(make_trainer):
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        trainer = make_trainer(lmbda=0.0, max_steps=1, **{name: True})
        trainer.train()
        assert trainer.model.is_gradient_checkpointing


def test_resume_from_checkpoint_in_the_config_is_read(make_trainer):
    """transformers leaves it to scripts, and a script that forgets it starts anew, silently."""
    make_trainer(lmbda=0.0, max_steps=2, save_strategy="steps", save_steps=1).train()
    again = make_trainer(lmbda=0.0, max_steps=3, resume_from_checkpoint="true")
    again.train()
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3]
    assert again.run_checkpoints[0].endswith("checkpoint-2")


def test_lengths_are_counted_whatever_column_is_named(make_trainer, caplog):
    rows = Dataset.from_list([{**row, "size": 1} for row in addition_dataset(24)])
    trainer = make_trainer(
        train=rows, lmbda=0.0, max_steps=1, train_sampling_strategy="group_by_length", length_column_name="size"
    )
    trainer.train()
    assert "`length_column_name: size` has no effect" in caplog.text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_kwargs: .*unexpected keyword argument 'foo'"),
        ({"lr_scheduler_kwargs": {"num_cycles": "two"}, "lr_scheduler_type": "cosine"}, "which takes num_cycles"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "which takes none"),
        ({"optim_args": "foo=1"}, "transformers reads no 'foo'"),
        ({"optim_args": "momentum"}, "optim_args: momentum.*key=value"),
        ({"optim": "sgd", "optim_args": "momentum=high"}, "could not convert"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "Invalid momentum"),
        ({"accelerator_config": {"even": True}}, "accelerator_config"),
        ({"accelerator_config": 1}, "accelerator_config: 1"),  # once it was opened as a file, and closed stdout
        ({"activation_checkpointing_kwargs": {"a": 1}}, "Unknown key 'a'"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
        ({"dataloader_persistent_workers": True}, "dataloader_num_workers"),
        ({"ddp_backend": "glue"}, "one of nccl, gloo"),
        ({"log_level": "loud"}, "log_level: loud"),
        ({"train_sampling_strategy": "any"}, "train_sampling_strategy: any"),
        ({"max_steps": 0}, "max_steps: 0"),
        ({"max_steps": -3}, "max_steps: -3"),
        ({"warmup_steps": 1.5}, "warmup_steps: 1.5"),
        ({"eval_steps": 0}, "eval_steps: 0"),
        ({"seed": 2**32}, "seed: 4294967296.*4294967295"),
        ({"learning_rate": 1e39}, "float32"),
        ({"learning_rate": 10**5000}, "thousands of digits"),
        ({"debug": ["everything"]}, "debug: everything"),
        ({"fsdp": "all"}, "transformers cannot work with these settings: Unknown `fsdp` option"),
        ({"load_best_model_at_end": True}, "transformers cannot work with these settings: .*save and eval strategy"),
        ({"run_name": "a\0b"}, "run_name: .*NUL"),
        ({"output_dir": ""}, 'output_dir: ""'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_would_fail_after_loading_is_refused(given, told):
    with pytest.raises(ConfigurationError, match=told):
        GKDConfig(**PLAIN | given)


@pytest.mark.parametrize(
    "given",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '{"num_decay_steps": 5}'},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "rmsprop", "optim_args": "alpha=0.99"},
        {"warmup_steps": 3000},
        {"warmup_steps": 0.1, "save_steps": 0.5, "logging_steps": 0.2},
        {"learning_rate": 0.0},
    ],
    ids=str,
)
def test_what_works_is_taken(given):
    GKDConfig(**PLAIN | given)
