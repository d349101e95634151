"""Runs that are killed, diverge or fill the disk: what is resumed from, and that it continues exactly."""

from __future__ import annotations

import copy
import errno
import logging
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from distill_trainers.exceptions import CheckpointError, TrainingDivergedError
from distill_trainers.run_files import check_resumable, find_last_complete_checkpoint, last_complete_checkpoint
from distill_trainers.toy import addition_dataset
from distill_trainers.trainers.lifecycle.checkpoints import _content_of

# 24 rows in windows of 2 x 2: 6 steps an epoch.
RUN = {"max_steps": 14, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def _weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _assert_same_run(whole, resumed, by_step, first_step):
    for name in ("loss", "grad_norm", "trained_tokens", "rollouts"):
        uninterrupted = {step: value for step, value in by_step(whole, name).items() if step > first_step}
        assert {step: value for step, value in by_step(resumed, name).items() if step > first_step} == uninterrupted
    expected = _weights(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(resumed.model).items())


def _shuffled_stream():
    return addition_dataset(26).to_iterable_dataset().shuffle(seed=3, buffer_size=10)  # 6 windows, and a cut one


@pytest.mark.parametrize("order", ["group_by_length", "stream"])
def test_a_run_killed_twice_resumes_exactly(make_trainer, make_student, by_step, die_at, tmp_path, order):
    """Mid-epoch in epochs 1 and 2, rows in an order that is drawn; tests/test_methods.py kills every method once."""
    more = {"train": _shuffled_stream()} if order == "stream" else {"train_sampling_strategy": order}
    settings = {**RUN, **more, "lmbda": 0.5, "save_strategy": "steps", "save_steps": 3, "disable_dropout": False}
    settings["verify_saved"] = False
    student = {"attention_dropout": 0.1}
    whole = make_trainer(make_student(**student), output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    assert len(by_step(whole)) == 14
    assert len(set(by_step(whole).values())) == 14
    broken = {**settings, "output_dir": str(tmp_path / "broken")}
    for resume, kill in ((None, 5), (True, 11)):
        trainer = make_trainer(make_student(**student), callbacks=[die_at(kill)], **broken)
        with pytest.raises(die_at.error):
            trainer.train(resume_from_checkpoint=resume)
    resumed = make_trainer(make_student(seed=99, **student), **broken)
    resumed.train(resume_from_checkpoint=True)
    assert min(by_step(resumed)) == 1, "the log of the earlier parts is in the checkpoint"
    _assert_same_run(whole, resumed, by_step, first_step=0)


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "stream"])
def test_a_second_epoch_has_an_order_of_its_own_and_a_resumed_one_keeps_it(
    make_trainer, by_step, die_at, tmp_path, strategy
):
    """With learning rate 0 the loss is a fingerprint of a step's rows."""
    settings = {**RUN, "max_steps": 12, "lmbda": 0.0, "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 8}
    settings |= {"train_sampling_strategy": strategy} if strategy != "stream" else {"train": _shuffled_stream()}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    losses = by_step(whole)
    epochs = [[losses[step] for step in range(first, first + 6)] for first in (1, 7)]
    assert epochs[0] != epochs[1]
    broken = {**settings, "output_dir": str(tmp_path / "broken"), "verify_saved": False}
    with pytest.raises(die_at.error):
        make_trainer(callbacks=[die_at(9)], **broken).train()
    resumed = make_trainer(**broken)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-8"))
    assert [by_step(resumed)[step] for step in range(9, 13)] == epochs[1][2:]


def test_an_incomplete_checkpoint_is_passed_over(make_trainer, by_step, tmp_path):
    settings = {**RUN, "max_steps": 6, "lmbda": 0.5, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**settings)
    whole.train()
    out = tmp_path / "out"
    (out / "checkpoint-6" / "trainer_state.json").unlink()
    (out / "checkpoint-notes").mkdir()
    assert last_complete_checkpoint(out) == str(out / "checkpoint-4")
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    _assert_same_run(whole, resumed, by_step, first_step=4)


def test_checkpoints_of_one_moment_are_ordered_by_number(tmp_path):
    """As copies may be; 9 is not after 100."""
    for step in (100, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text("{}")
        os.utime(state, (1e9, 1e9))
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_the_checkpoint_written_last_is_the_newest(tmp_path, caplog):
    """A run that diverged leaves one behind; the user goes back, and is stopped before that step."""
    for age, step in enumerate((20, 41, 30)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text("{}")
        os.utime(state, (1e9 + age, 1e9 + age))
    with caplog.at_level(logging.WARNING):
        assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-30")
    assert "written after checkpoint-41 of a later step" in caplog.text


def test_a_checkpoint_may_be_a_path(make_trainer, tmp_path):
    """What the method keeps comes back too."""
    settings = {"lmbda": 0.5, "replay_buffer_size": 8, "save_strategy": "steps", "save_steps": 2}
    make_trainer(max_steps=2, **settings).train()
    trainer, loaded = make_trainer(max_steps=3, **settings), []
    trainer.load_method_state = loaded.append
    trainer.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-2")
    assert len(loaded) == 1 and loaded[0]


def test_a_stream_is_resumed_wherever_in_its_passes(make_trainer, by_step, die_at, tmp_path):
    """6 windows a pass: at the end of the first pass, of the second, and after one step of the third."""
    settings = {**RUN, "lmbda": 0.0, "train": _shuffled_stream(), "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(**{**settings, "save_strategy": "no"})
    whole.train()
    for kill in (7, 12, 13):
        broken = {**settings, "output_dir": str(tmp_path / f"{kill}"), "save_steps": kill, "verify_saved": False}
        with pytest.raises(die_at.error):
            make_trainer(callbacks=[die_at(kill)], **broken).train()
        resumed = make_trainer(**broken)
        resumed.train(resume_from_checkpoint=True)
        assert by_step(resumed, "epoch") == by_step(whole, "epoch")
        _assert_same_run(whole, resumed, by_step, first_step=0)


def test_the_order_of_rows_depends_on_seed_and_epoch_alone(make_trainer):
    """Whatever the process's own random state is, which with dropout is another on each process."""
    for strategy in ("random", "group_by_length"):
        trainer = make_trainer(train_sampling_strategy=strategy)
        orders = []
        for epoch in (0.0, 0.5, 1.0):
            trainer.state.epoch = epoch
            torch.manual_seed(len(orders))
            orders.append(list(trainer._get_train_sampler()))
        assert sorted(orders[0]) == list(range(24))
        assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("named", [True, False])
def test_resuming_without_the_optimizers_state_is_refused(make_trainer, tmp_path, named):
    settings = {"save_strategy": "steps", "save_steps": 2, "lmbda": 0.0, "max_steps": 2}
    make_trainer(save_only_model=True, **settings).train()
    folder = str(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(CheckpointError, match="checkpoint-2.*no optimizer state.*Start a new run"):
        make_trainer(**settings).train(resume_from_checkpoint=folder if named else True)


@pytest.mark.parametrize("steps", [4, 6], ids=["mid-epoch", "end of an epoch"])
def test_resuming_a_run_that_has_taken_all_its_steps_takes_no_more(make_trainer, by_step, tmp_path, steps):
    """Killed after its last checkpoint, before the student was saved."""
    settings = {"lmbda": 0.0, "max_steps": steps, "save_strategy": "steps", "save_steps": steps}
    whole, again = make_trainer(**settings), make_trainer(**settings)
    whole.train()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps and by_step(again) == by_step(whole)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_resuming_from_nothing_is_refused(make_trainer):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)


# ---- Divergence -----------------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Keeps the weights with which the last completed step ended."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = copy.deepcopy(model.state_dict())

    on_step_end = on_train_begin


def _poison(trainer, step, value, micro_batch=0):
    inner, seen = trainer.distill_terms, []

    def distill_terms(student, teacher, tokens):
        terms = inner(student, teacher, tokens)
        if trainer.state.global_step == step and trainer.model.training:
            seen.append(1)
            if len(seen) == micro_batch + 1:
                terms["divergence"] = terms["divergence"] * value
        return terms

    trainer.distill_terms = distill_terms


@pytest.mark.parametrize("value, micro_batch", [(float("nan"), 0), (float("nan"), 1), (float("inf"), 1)])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_trainer, by_step, tmp_path, value, micro_batch):
    settings = {**RUN, "max_steps": 5, "lmbda": 0.0}
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder], **settings)
    _poison(trainer, step=3, value=value, micro_batch=micro_batch)
    with pytest.raises(TrainingDivergedError, match=r"step 4 .*checkpoint-3\b"):
        trainer.train()
    assert all(torch.equal(value, recorder.weights[name]) for name, value in trainer.model.state_dict().items())
    # What was kept continues as if nothing had happened.
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    _assert_same_run(whole, resumed, by_step, first_step=3)


def test_a_gradient_that_is_not_finite_stops_as_well(make_trainer):
    """A finite loss can have an infinite gradient: a root or a norm at 0 somewhere in the backbone."""
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder], lmbda=0.0)
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda grad: grad * float("nan") if trainer.state.global_step == 1 else grad)
    with pytest.raises(TrainingDivergedError, match="step 2"):
        trainer.train()
    assert all(torch.equal(value, recorder.weights[name]) for name, value in trainer.model.state_dict().items())


def test_divergence_in_the_first_step_names_no_checkpoint(make_trainer):
    trainer = make_trainer(lmbda=0.0)
    _poison(trainer, step=0, value=float("nan"))
    with pytest.raises(TrainingDivergedError, match="No checkpoint"):
        trainer.train()


def test_a_diverged_run_keeps_its_last_good_checkpoint(make_trainer, tmp_path):
    """Rotation would leave only the newest: the state before the failing step, which nobody calls good."""
    trainer = make_trainer(lmbda=0.0, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1)
    _poison(trainer, step=3, value=float("nan"))
    with pytest.raises(TrainingDivergedError) as caught:
        trainer.train()
    message, out = str(caught.value), tmp_path / "out"
    assert f"The last good checkpoint is {out / 'checkpoint-2'}." in message
    assert f"The state before the failing step is kept in {out / 'checkpoint-3'}." in message
    assert last_complete_checkpoint(out) == str(out / "checkpoint-3")
    assert (out / "checkpoint-2" / "trainer_state.json").is_file()
    assert trainer.args.save_total_limit == 1


def test_checkpoints_of_an_earlier_run_are_not_this_runs(make_trainer, by_step, tmp_path):
    out = tmp_path / "out"
    make_trainer(lmbda=0.0, max_steps=5, save_strategy="steps", save_steps=1, seed=5).train()
    trainer = make_trainer(lmbda=0.0, max_steps=6)
    _poison(trainer, step=2, value=float("nan"))
    with pytest.raises(TrainingDivergedError) as caught:
        trainer.train()
    assert "No checkpoint had been written by this run" in str(caught.value)
    assert "checkpoint-5" not in str(caught.value)
    kept = load_file(out / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in trainer.model.state_dict().items() if name in kept)


def test_the_checkpoint_a_run_went_on_from_is_one_of_its_own(make_trainer, tmp_path):
    make_trainer(lmbda=0.0, max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = make_trainer(lmbda=0.0, max_steps=6)
    _poison(trainer, step=2, value=float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"last good checkpoint is \S*checkpoint-2\. Go on"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("engine", ["decode", "hf"])
def test_weights_that_are_nan_stop_a_run_that_samples(make_trainer, tmp_path, engine):
    class Ruin(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.lm_head.weight.data.fill_(float("nan"))

    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer = make_trainer(lmbda=1.0, rollout_engine=engine, callbacks=[Ruin()], **settings)
    with pytest.raises(TrainingDivergedError, match=r"step 3 is NaN.*last good checkpoint is \S*checkpoint-1\."):
        trainer.train()


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_never_takes_the_last_good_checkpoint(make_trainer, die_at, tmp_path, limit):
    """Not even beside one that a killed run left half written, under a higher number and newer than the good one."""
    settings = {"lmbda": 0.0, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": limit}
    with pytest.raises(die_at.error):
        make_trainer(callbacks=[die_at(2)], **settings).train()
    torn = tmp_path / "out" / "checkpoint-4"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    with pytest.raises(die_at.error):
        make_trainer(callbacks=[die_at(3)], **settings).train(resume_from_checkpoint=True)
    assert find_last_complete_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-3")
    make_trainer(**settings).train(resume_from_checkpoint=True)
    left = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert left == ["checkpoint-5", "checkpoint-6"][-limit:]


# ---- A full disk ----------------------------------------------------------------------------------------------------


def _fill_disk(trainer, step, limit):
    """The checkpoint of `step` finds a disk on which no file can grow beyond `limit` bytes."""
    inner = trainer._save_checkpoint

    def save(*args, **kwargs):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.state.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return inner(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    trainer._save_checkpoint = save


@pytest.mark.parametrize("limit", [100, 20_000, 120_000], ids=["nothing fits", "weights fail", "optimizer fails"])
def test_a_full_disk_keeps_the_earlier_checkpoint(make_trainer, make_student, by_step, tmp_path, limit):
    settings = {**RUN, "max_steps": 6, "lmbda": 0.5, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    weights = sum(p.numel() for p in make_student().parameters()) * 4
    assert 20_000 < weights < 120_000 < 2 * weights, "the limits stand for these sizes"
    trainer = make_trainer(**settings)
    _fill_disk(trainer, 4, limit)
    with pytest.raises(CheckpointError, match=r"checkpoint-4.*intact") as caught:
        trainer.train()
    assert caught.value.__cause__ is not None
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2"]
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    _assert_same_run(whole, resumed, by_step, first_step=2)


def test_no_space_left_is_said_in_words(make_trainer, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device.*MiB were free"):
        make_trainer(save_strategy="steps", save_steps=1).train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("part", ["_push_from_checkpoint", "rotate_checkpoints"])
def test_what_fails_after_a_checkpoint_costs_no_checkpoint(make_trainer, monkeypatch, tmp_path, part):
    """An upload, or the rotation: the error is its own, and the new checkpoint is whole."""

    def refuse(*args, **kwargs):
        raise ConnectionError("the Hub is away")

    trainer = make_trainer(save_strategy="steps", save_steps=2, lmbda=0.0)
    if part == "rotate_checkpoints":
        monkeypatch.setattr("transformers.trainer.rotate_checkpoints", refuse)
    else:
        trainer.args.push_to_hub, trainer._push_from_checkpoint = True, refuse
    with pytest.raises(ConnectionError, match="^the Hub is away$"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")


def test_a_full_disk_spares_what_an_earlier_run_left_under_that_name(make_trainer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "lmbda": 0.0, "max_steps": 2}
    make_trainer(seed=5, **settings).train()
    folder = tmp_path / "out" / "checkpoint-2"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    trainer = make_trainer(**settings)
    _fill_disk(trainer, 2, 20_000)
    with pytest.raises(CheckpointError, match=r"checkpoint-2: "):
        trainer.train()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    make_trainer(**settings).train()
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["checkpoint-2"]


def test_a_torn_trainer_state_is_no_checkpoint(tmp_path):
    for step, state in ((2, "{}"), (4, '{"epoch": 0.')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_checkpoint_is_an_ordinary_model(make_trainer, tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = make_trainer(save_strategy="steps", save_steps=3, lmbda=0.0)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-3"
    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    model, ids = AutoModelForCausalLM.from_pretrained(copied), torch.tensor([[4, 5, 12, 6, 13]])
    assert torch.equal(model(ids).logits, trainer.model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(copied)("37+58=").input_ids == tokenizer("37+58=").input_ids
    assert not any("forward" in vars(module) for module in model.modules())
    assert {path.name for path in Path(copied).iterdir()} >= {"config.json", "model.safetensors", "trainer_state.json"}


# ---- Damage, and other settings -------------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(make_trainer, tmp_path):
    """A run's folder with checkpoint-2 and checkpoint-4, whole."""
    make_trainer(max_steps=4, save_strategy="steps", save_steps=2).train()
    return tmp_path / "out"


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]


def test_damage_is_named_with_the_newest_whole_checkpoint(make_trainer, two_checkpoints):
    """Every file, in four ways."""
    last = two_checkpoints / "checkpoint-4"
    for name in [*FILES, "manifest.json"]:
        file = last / name
        data, middle = file.read_bytes(), file.stat().st_size // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        for harmed in (flipped, data[: middle + 1], b"", None):
            file.unlink() if harmed is None else file.write_bytes(harmed)
            if (name, harmed) != ("manifest.json", None):  # without it, it is a checkpoint of transformers' own
                with pytest.raises(CheckpointError, match=f"is damaged: {name} .*newest whole one is .*checkpoint-2"):
                    check_resumable(last)
        file.write_bytes(data)
        check_resumable(last)
    (last / "rng_state.pth").unlink()
    trainer = make_trainer(max_steps=6)
    with pytest.raises(CheckpointError, match=r"is damaged: rng_state.pth is missing"):
        trainer.train(resume_from_checkpoint=str(last))
    trainer.train(resume_from_checkpoint=str(two_checkpoints / "checkpoint-2"))
    assert trainer.state.global_step == 6


@pytest.mark.parametrize(
    ("name", "cut"),
    [("teacher_state.safetensors", b"\x40"), ("distill_state.safetensors", b"\x40"), ("distill_state.json", b"{")],
)
def test_a_damaged_state_is_named_without_a_manifest(make_trainer, tmp_path, name, cut):
    settings = {"self_teacher": "ema", "lmbda": 0.0, "save_strategy": "steps", "save_steps": 1}
    make_trainer(teacher=None, max_steps=1, **settings).train()
    folder = tmp_path / "out" / "checkpoint-1"
    (folder / "manifest.json").unlink()
    (folder / name).write_bytes(cut)
    with pytest.raises(CheckpointError, match=f"checkpoint-1' is damaged: {name} cannot be read"):
        make_trainer(teacher=None, max_steps=2, **settings).train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_that_may_not_be_read_is_refused_by_name(two_checkpoints, monkeypatch):
    """As where the file belongs to somebody else; root may read all."""
    from distill_trainers import manifest

    def closed(file, read=manifest._checksum):
        if file.name == "optimizer.pt" and file.parent.name == "checkpoint-4":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return read(file)

    monkeypatch.setattr(manifest, "_checksum", closed)
    with pytest.raises(CheckpointError, match="damaged: optimizer.pt cannot be read.*checkpoint-2: name that"):
        check_resumable(two_checkpoints / "checkpoint-4")


def test_a_checkpoint_that_was_never_sealed_still_needs_its_schedule(make_trainer, two_checkpoints):
    for name in ("manifest.json", "scheduler.pt"):
        (two_checkpoints / "checkpoint-4" / name).unlink()
    with pytest.raises(CheckpointError, match="no scheduler.pt"):
        make_trainer(max_steps=6).train(resume_from_checkpoint=str(two_checkpoints / "checkpoint-4"))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"learning_rate": 1e-3},
        {"lr_scheduler_type": "linear"},
        {"gradient_accumulation_steps": 2},
        {"kd_temperature": 2.0},
        {"optim": "sgd"},
    ],
    ids=str,
)
def test_other_settings_are_listed_and_refused_unless_told(make_trainer, two_checkpoints, changes, caplog):
    name = "rows of a step" if "gradient_accumulation_steps" in changes else next(iter(changes))
    folder = str(two_checkpoints / "checkpoint-2")
    with pytest.raises(CheckpointError, match=f"{name}: .*, now .*resume_anyway: true"):
        make_trainer(max_steps=4, **changes).train(resume_from_checkpoint=folder)
    if "optim" in changes:  # another optimiser's state does not fit: that is torch's own error
        return
    make_trainer(max_steps=4, resume_anyway=True, **changes).train(resume_from_checkpoint=folder)
    assert f"{name}: " in caplog.text


def test_another_teacher_or_other_rows_are_refused(make_trainer, make_teacher, two_checkpoints, tmp_path):
    folder = str(two_checkpoints / "checkpoint-2")
    teacher = make_teacher(seed=8)
    teacher.save_pretrained(tmp_path / "other")
    teacher.config.name_or_path = str(tmp_path / "other")
    with pytest.raises(CheckpointError, match="teacher: .*'other'"):
        make_trainer(teacher=teacher, max_steps=4).train(resume_from_checkpoint=folder)
    trainer = make_trainer(max_steps=4)
    trainer.train_dataset = trainer.train_dataset.select(range(8))
    with pytest.raises(CheckpointError, match="rows of train_dataset: .*, now 8"):
        trainer.train(resume_from_checkpoint=folder)


def test_settings_that_change_nothing_may_change(make_trainer, two_checkpoints):
    changes = {"logging_steps": 3, "save_steps": 1, "eval_strategy": "no", "loss_chunk_mib": 1.0, "run_name": "b"}
    trainer = make_trainer(max_steps=6, save_strategy="steps", **changes)
    trainer.train(resume_from_checkpoint=str(two_checkpoints / "checkpoint-4"))
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("method, settings", [("gkd", {"seq_kd": True}), ("dpkd", {}), ("rationale", {})])
def test_rows_that_a_method_replaces_are_the_same_when_it_goes_on(make_trainer, by_step, tmp_path, method, settings):
    settings = {"method": method, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, **settings}
    first, second = make_trainer(**settings), make_trainer(**settings)
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert by_step(second) == by_step(first)


def test_a_teacher_or_rows_that_only_look_the_same_are_refused(make_trainer, make_teacher, rows_for, two_checkpoints):
    """Equally many rows; a teacher of the same class without a name."""
    folder = str(two_checkpoints / "checkpoint-2")
    with pytest.raises(CheckpointError, match="teacher's weights: "):
        make_trainer(teacher=make_teacher(seed=8), max_steps=4).train(resume_from_checkpoint=folder)
    with pytest.raises(CheckpointError, match="content of train_dataset: "):
        make_trainer(train=rows_for("gkd")(24, 99), max_steps=4).train(resume_from_checkpoint=folder)


@pytest.mark.parametrize("schedule, told", [("cosine", True), ("constant", False)])
def test_a_schedule_that_depends_on_the_number_of_steps_is_told_of(make_trainer, tmp_path, caplog, schedule, told):
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": schedule}
    make_trainer(max_steps=2, **settings).train()
    folder = str(tmp_path / "out" / "checkpoint-1")
    make_trainer(max_steps=2, **settings).train(resume_from_checkpoint=folder)
    assert "its learning rate is another" not in caplog.text
    make_trainer(max_steps=4, **settings).train(resume_from_checkpoint=folder)
    assert (
        "was to take 2 optimiser steps, and now 4: from here on its learning rate is another" in caplog.text
    ) == told


@pytest.mark.parametrize(
    "text", ['["a"]', '{"files": ["a"]}', '{"files": {"config.json": 3}, "settings": {}}', '{"settings": ["a"]}']
)
def test_a_manifest_of_another_tool_says_nothing(two_checkpoints, text):
    (two_checkpoints / "checkpoint-4" / "manifest.json").write_text(text)
    check_resumable(two_checkpoints / "checkpoint-4")


@pytest.mark.parametrize("change", [('"xxh3"', '"xxh4"'), ('"bytes"', '"byte3"'), ('"settings"', '"Settings"')])
def test_a_manifest_with_a_changed_key_is_damaged(two_checkpoints, change):
    file = two_checkpoints / "checkpoint-4" / "manifest.json"
    file.write_text(file.read_text().replace(*change, 1))
    with pytest.raises(CheckpointError, match="is damaged: manifest.json"):
        check_resumable(two_checkpoints / "checkpoint-4")


def test_rows_of_objects_have_the_same_content_in_every_process():
    """An object that has no text of its own tells its address."""
    first, second = ([{"input_ids": [1, 2], "image": object()}] for _ in range(2))
    assert str(first) != str(second) and _content_of(first) == _content_of(second)


def test_rows_put_in_after_a_run_are_those_of_the_next_one(make_trainer):
    trainer = make_trainer(lmbda=0.0, max_steps=1)
    trainer.train()
    first, other = trainer.exact_settings()["content of train_dataset"], addition_dataset(24, seed=7)
    trainer.train()
    assert trainer.exact_settings()["content of train_dataset"] == first
    trainer.train_dataset = other
    trainer.train()
    assert trainer.exact_settings()["content of train_dataset"] == _content_of(other) != first


@pytest.mark.parametrize("name", ["nope", "file", ""])
def test_what_is_no_folder_is_no_checkpoint(make_trainer, tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="expected the folder of a checkpoint"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / name) if name else "")


def test_a_manifest_holds_no_secret_and_nothing_of_one_process_alone(make_trainer, saved):
    """Checkpoints may be uploaded; an object's address would never be the same again."""
    hidden = {
        "token": "hf_abcdefghijklmnopqrstuvwx",
        "proxies": {"https": "http://me:PASSWORD@proxy"},
        "subfolder": "",
    }
    trainer = make_trainer(student=saved.student, model_init_kwargs={**hidden, "dtype": torch.float32})
    trainer.args.optim_args = "note=http://me:PASSWORD@proxy"
    trainer.args.lr_scheduler_kwargs = {"f": make_trainer, "x": {"b", "a"}, "g": object()}
    settings = trainer.exact_settings()
    assert not any(secret in str(settings) for secret in ("hf_abc", "PASSWORD", " at 0x"))
    assert settings["model_init_kwargs"] == {"subfolder": "", "dtype": "torch.float32"}
    assert settings["lr_scheduler_kwargs"]["x"] == ["a", "b"]


def _lora(r=2, targets=("q_proj",), **settings):
    return LoraConfig(r=r, target_modules=list(targets), task_type="CAUSAL_LM", **settings)


OF_AN_ADAPTER = [
    ({"peft_config": _lora(lora_alpha=64)}, "adapter default, lora_alpha: 8, now 64"),
    ({"peft_config": _lora(use_rslora=True)}, "adapter default, use_rslora: False, now True"),
    ({"peft_config": _lora(), "student": {"seed": 5}}, "the adapter's base: "),
    ({"peft_config": _lora(4)}, "trained weights: "),
    ({"peft_config": _lora(targets=["q_proj", "k_proj"])}, "trained weights: "),
    ({}, "trained weights: "),
]
OF_ALL_WEIGHTS = [
    ({"peft_config": _lora()}, "trained weights: "),
    ({"student": {"num_hidden_layers": 3}}, "trained weights: "),
    ({"student": {"dtype": torch.bfloat16}}, "trained weights: "),
]


@pytest.mark.parametrize(
    "then, others", [({"peft_config": _lora()}, OF_AN_ADAPTER), ({}, OF_ALL_WEIGHTS)], ids=["adapter", "all weights"]
)
def test_another_student_or_adapter_is_refused(make_trainer, make_student, tmp_path, then, others):
    def trainer(student=None, **settings):
        config = dict(student or {})
        dtype = config.pop("dtype", torch.float32)
        settings |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lmbda": 0.0}
        return make_trainer(student=make_student(**config).to(dtype), **copy.deepcopy(settings))

    trainer(**then).train()
    for now, named in others:
        with pytest.raises(CheckpointError, match=named):
            trainer(**now).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    trainer(**then).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
