"""`per_device_train_tokens`: what batches hold, what is trained on them, and what is refused before that."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import T5Config, T5ForConditionalGeneration

from distill_trainers.doctor import Case, Launch, room
from distill_trainers.doctor.work import workload
from distill_trainers.exceptions import CheckpointError, ConfigurationError, DatasetError
from distill_trainers.recipe.checks import optimiser_steps
from distill_trainers.toy import RATIONALE_PROMPTS, addition_dataset, addition_rationales
from distill_trainers.trainers import METHODS
from distill_trainers.trainers.given.token_batches import refuse_uneven_sampling, row_tokens

EPOCH = {"per_device_train_batch_size": 8, "max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0}
TOKENS = {**EPOCH, "per_device_train_tokens": 66, "gradient_accumulation_steps": 2}
GROUPS = {"lmbda": 1.0, "reward_funcs": ["length:3"], "num_generations": 4, "reward_schedule": "joint"}
RATIONALES = {**RATIONALE_PROMPTS, "max_length": 60, "max_new_tokens": 20}


def of_many_lengths(count=30):
    """Rows of 3 to 16 tokens, most of them short."""
    lengths = [3 + (7 * row % 11 if row % 3 else 13) % 14 for row in range(count)]
    return Dataset.from_list(
        [{"input_ids": [4 + (row + t) % 9 for t in range(n)], "prompt_length": 1} for row, n in enumerate(lengths)]
    )


def watched(trainer):
    """The shapes of all micro-batches that a trainer trains on, student's and teacher's."""
    shapes, compute_loss = [], trainer.compute_loss

    def look(model, inputs, *args, **kwargs):
        if model.training:
            shapes.append(tuple(inputs["input_ids"].shape))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = look
    return shapes


# ---- What is trained ------------------------------------------------------------------------------------------------


def test_an_epoch_is_the_mean_over_the_tokens_of_all_rows(make_trainer, by_step, dense, jsd_mean):
    """Each row once: losses of steps, weighed by their tokens, are that of every row by itself, without padding."""
    trainer = make_trainer(train=of_many_lengths(), lmbda=0.0, **TOKENS)
    shapes = watched(trainer)
    trainer.train()
    losses, tokens, padding = (
        list(by_step(trainer, name).values()) for name in ("loss", "trained_tokens", "padding_share")
    )
    rows = list(trainer.train_dataset)
    assert sum(tokens) == sum(label != -100 for row in rows for label in row["labels"][1:])
    whole = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert whole == pytest.approx(jsd_mean(dense(trainer.model, trainer.teacher.model, rows)), rel=1e-5)
    assert all(count * width <= 66 for count, width in shapes) and len({width for _, width in shapes}) > 3
    padded = [sum(math.prod(shape) for shape in shapes[step : step + 2]) for step in range(0, len(shapes), 2)]
    assert sum(p * n for p, n in zip(padding, padded, strict=True)) == pytest.approx(
        sum(padded) - sum(len(row["input_ids"]) for row in rows)
    )


def test_a_batch_is_what_its_rows_make_of_it(make_trainer, make_student):
    """Loss and gradient are those of the same rows in an ordinary batch, and of each row alone."""
    trainer = make_trainer(make_student().double(), "double", train=of_many_lengths(), lmbda=0.0, **TOKENS)
    loader = trainer.get_train_dataloader()
    batch, numbers = next(iter(loader)), next(iter(loader.batch_sampler))
    rows = [trainer.train_dataset[number] for number in numbers]
    found = []
    for batches in ([batch], [trainer.data_collator(rows)], [trainer.data_collator([row]) for row in rows]):
        taken, counts = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
        trainer.model.zero_grad()
        losses = [trainer.compute_loss(trainer.model, inputs, num_items_in_batch=counts) for inputs in taken]
        sum(losses).backward()
        grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        found.append((sum(losses).item(), grads))
    assert len(rows) > 2 and found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert found[0][0] == pytest.approx(found[2][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[2][1], rtol=1e-4, atol=1e-7)


METHODS_THAT_COUNT = {
    "on-policy": ("gkd", 66, {"lmbda": 1.0}),
    "groups": (
        "gkd",
        66,
        {"lmbda": 1.0, "reward_funcs": ["length:3"], "num_generations": 3, "reward_schedule": "joint"},
    ),
    "context": ("gkd", 90, {"lmbda": 0.0, "teacher_system_prompt": "12+34"}),
    "packed": ("gkd", 60, {"lmbda": 0.0, "packing": True}),
    "minillm": ("minillm", 66, {}),
    "pairs": ("dpkd", 66, {}),
    "step_by_step": ("rationale", 130, {**RATIONALES, "objective": "step_by_step"}),
    "dual_chain": ("rationale", 130, {**RATIONALES, "objective": "dual_chain", "innovation_samples": 1}),
}


@pytest.mark.parametrize("case", METHODS_THAT_COUNT)
def test_no_batch_of_any_method_is_larger(make_trainer, by_step, case):
    method, tokens, settings = METHODS_THAT_COUNT[case]
    rows = (addition_rationales if method == "rationale" else addition_dataset)(12)
    settings = {**TOKENS, **settings, "per_device_train_tokens": tokens}
    trainer = make_trainer(method=method, train=rows, **settings)
    shapes = watched(trainer)
    trainer.train()
    assert shapes and all(count * width <= tokens for count, width in shapes)
    assert max(count for count, _ in shapes) > 1 or case == "dual_chain"
    copies = settings.get("num_generations", 1)
    if trainer.requirements.samples_completions and case != "dual_chain":
        assert sum(by_step(trainer, "rollouts").values()) == 12 * copies
    else:
        assert sum(by_step(trainer, "trained_tokens").values()) > 0
    assert trainer.state.global_step == len(trainer.get_train_dataloader()) / 2
    speed = trainer.state.log_history[-1]
    rows = len(trainer.train_dataset)
    assert speed["train_samples_per_second"] * speed["train_runtime"] == pytest.approx(rows, rel=0.01)


def test_what_a_row_takes_is_the_longest_that_it_may_get(make_trainer):
    trainer = make_trainer(lmbda=1.0, **TOKENS)
    rows = trainer.train_dataset
    prompts, given = rows["prompt_length"][:], rows["length"][:]
    assert row_tokens(rows, trainer.args, sampled=False) == given
    assert row_tokens(rows, trainer.args, sampled=True) == [max(n, p + 4) for n, p in zip(given, prompts, strict=True)]
    views = rows.add_column("teacher_length", [20] * len(rows))
    trainer.args.pad_to_multiple_of = 8
    assert set(row_tokens(views, trainer.args, sampled=True)) == {24}


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"lmbda": 0.0}, False),
        ({"lmbda": 0.5}, True),
        ({"lmbda": 0.5, "gradient_accumulation_steps": 2}, False),
        ({"method": "dpkd"}, True),
    ],
    ids=str,
)
def test_steps_of_one_length_that_are_counted_by_rows_are_warned_of(make_trainer, caplog, settings, warned):
    """Many short rows, or few long ones, make a step of the same weight: a pair of long ones learns more."""
    make_trainer(**{**TOKENS, "gradient_accumulation_steps": 1, **settings})
    said = "`per_device_train_tokens: 66` with `gradient_accumulation_steps: 1`"
    assert any(said in record.getMessage() for record in caplog.records) == warned


# ---- Steps, and going on --------------------------------------------------------------------------------------------


def test_steps_are_known_before_and_full(make_trainer):
    trainer = make_trainer(train=of_many_lengths(), lmbda=0.0, **{**TOKENS, "num_train_epochs": 2})
    tokens = row_tokens(trainer.train_dataset, trainer.args, sampled=False)
    steps = optimiser_steps(trainer.args, 30, tokens=tokens)
    shapes = watched(trainer)
    trainer.train()
    assert trainer.state.global_step == steps == trainer.state.max_steps and len(shapes) == 2 * steps
    assert optimiser_steps(trainer.args, 30, processes=2, tokens=tokens) * 2 <= steps + 2
    few = optimiser_steps(trainer.args, 3000, tokens=tokens)
    assert few == pytest.approx(100 * steps, rel=0.2), "of rows like those that were looked at"
    assert optimiser_steps(trainer.args, 30) >= steps


def test_a_run_killed_in_an_epoch_goes_on_with_its_batches(make_trainer, by_step, die_at, tmp_path):
    """With learning rate 0 the loss is a fingerprint of a step's rows; other sizes of batches are refused."""
    settings = {
        **TOKENS,
        "max_steps": 9,
        "train": of_many_lengths(48),
        "lmbda": 0.0,
        "teacher_cache": str(tmp_path / "c"),
    }
    settings |= {"save_strategy": "steps", "save_steps": 8, "verify_saved": False}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **{**settings, "save_strategy": "no"})
    whole.train()
    losses = by_step(whole)
    epoch = len(whole.get_train_dataloader()) // 2
    assert len(set(losses.values())) == 9 and 4 < epoch < 8, "the last steps are of an epoch with batches of its own"
    broken = {**settings, "output_dir": str(tmp_path / "broken")}
    with pytest.raises(die_at.error):
        make_trainer(callbacks=[die_at(8)], **broken).train()
    with pytest.raises(CheckpointError, match="per_device_train_tokens: 66, now 70; tokens of a step: 132, now 140"):
        make_trainer(**{**broken, "per_device_train_tokens": 70}).train(resume_from_checkpoint=True)
    resumed = make_trainer(**broken)
    resumed.train(resume_from_checkpoint=True)
    assert by_step(resumed) == losses


# ---- Refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"per_device_train_tokens": 0}, "`per_device_train_tokens: 0`; expected 1 or more"),
        ({"per_device_train_tokens": -4}, "`per_device_train_tokens: -4`; expected 1 or more"),
        ({"per_device_train_tokens": 9.5}, "`per_device_train_tokens: 9.5`; expected a whole number"),
        ({"per_device_train_batch_size": 4}, "`per_device_train_batch_size: 4`; expected none, or its default, beside"),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy: group_by_length`; expected random"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size: True`; expected false"),
        ({"packing": True, "lmbda": 0.0, "max_length": 100}, "at least `max_length: 100` with `packing`"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches: True`; expected false"),
        ({"lmbda": 0.5, "replay_buffer_size": 100}, "none where rows of a replay buffer"),
        ({"method": "minillm", "num_inner_epochs": 2}, "none where rollouts are reused"),
        ({"method": "dpkd", "refresh_steps": 2}, "none where pairs that were kept"),
        ({"method": "dpkd", "per_device_train_tokens": 1}, "`per_device_train_tokens: 1`; expected 2 or more, as a ba"),
        ({**GROUPS, "per_device_train_tokens": 3}, "expected 4 or more, as a batch has up to 4 sequences of each row"),
    ],
    ids=str,
)
def test_settings_that_count_rows_are_refused(tmp_path, settings, said):
    config_class = METHODS[settings.pop("method", "gkd")][0]
    settings = {"per_device_train_tokens": 64, **settings}
    with pytest.raises(ConfigurationError, match="(?s).*" + said.replace("?", r"\?")):
        config_class(str(tmp_path), use_cpu=True, report_to="none", **settings)


def test_rows_that_do_not_fit_are_refused_before_a_model_is_loaded(make_trainer, saved, monkeypatch):
    monkeypatch.setattr("distill_trainers.trainers.base.load_student", None)
    sizes = {**TOKENS, "per_device_train_tokens": 8}
    said = r"`per_device_train_tokens: 8`, but the longest row of dataset 'train' has \d+ tokens"
    with pytest.raises(ConfigurationError, match=rf"{said}; expected at least \d+, as no row is cut to fit"):
        make_trainer(saved.student, lmbda=0.0, **sizes)
    with pytest.raises(ConfigurationError, match=f"{said}, with up to max_new_tokens=4 sampled ones in each of the 2"):
        make_trainer(saved.student, method="dpkd", **sizes)


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        ({"teacher_mix_alpha": 0.2, "teacher_placement": "fsdp2"}, "teacher"),
        ({"teacher_mix_alpha": 0.0, "teacher_placement": "fsdp2"}, None),
        ({"teacher_mix_alpha": 0.2, "teacher_placement": "replicate"}, None),
    ],
)
def test_a_sharded_teacher_that_is_mixed_in_is_called_equally_often(tmp_path, settings, who):
    config_class = METHODS["minillm"][0]
    given = {"per_device_train_tokens": 64, "rollout_batch_size": 2, "use_cpu": True, "report_to": "none"}
    args = config_class(str(tmp_path), **given, **settings)
    launch = SimpleNamespace(num_processes=2, state=SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=None))
    refused = pytest.raises(ConfigurationError, match="a teacher that is sharded.*set `teacher_placement: replicate`")
    with refused if who else contextlib.nullcontext():
        refuse_uneven_sampling(args, launch, True)


def test_the_doctor_counts_all_sequences_of_a_row(tmp_path, monkeypatch):
    given = {"use_cpu": True, "report_to": "none", "per_device_train_tokens": 400, "max_length": 200, **GROUPS}
    args = METHODS["gkd"][0](str(tmp_path), **given)
    work = workload(args, "gkd", Launch(), samples=True)
    assert (work.length, work.rows) == (100, 4), "no row may be longer than a quarter of a batch"
    args.per_device_train_tokens = 1600
    case = Case(args, Launch(), "student", None, work=workload(args, "gkd", Launch(), samples=True), samples=True)
    monkeypatch.setattr(room, "memory_of", lambda case, **changes: SimpleNamespace(peak=0.0))
    remedy = room._remedy(case, room.Room(1.0, "here"))
    assert "`per_device_train_tokens: 800` with `gradient_accumulation_steps: 2`" in remedy


def test_data_without_known_lengths_is_refused(make_trainer):
    with pytest.raises(DatasetError, match="`per_device_train_tokens: 66` with a stream"):
        make_trainer(train=addition_dataset(8).to_iterable_dataset(), lmbda=0.0, **TOKENS)
    trainer = make_trainer(lmbda=0.0, **TOKENS)
    trainer.train_dataset = addition_dataset(8).to_iterable_dataset()
    with pytest.raises(DatasetError, match="`per_device_train_tokens: 66` with a stream"):
        trainer.train()
    text = Dataset.from_list([{"text": "12+34=46"}])
    with pytest.raises(ConfigurationError, match="with a `pretraining_dataset`.*`pretraining_weight: 0`"):
        make_trainer(method="minillm", pretraining_dataset=text, **TOKENS)
    make_trainer(method="minillm", pretraining_dataset=text, pretraining_weight=0.0, **TOKENS)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=14, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ConfigurationError, match="with an encoder-decoder"):
        make_trainer(t5, method="rationale", **{**TOKENS, **RATIONALES})
