"""A folder with checkpoints: the command asks whether to go on or to start anew, and Python is told."""

import json
import logging

import pytest

from distill_trainers import models
from distill_trainers.cli import main

SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


def steps_of(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in log if "loss" in entry]


def test_the_same_command_twice_is_refused_by_all_commands_before_anything_is_loaded(
    recipe, tmp_path, capsys, monkeypatch
):
    path = recipe(**SAVES)
    assert main(["train", "--config", path]) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(models, "load_causal_lm", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    for command in (["train"], ["train", "--dry_run", "true"], ["doctor", "--quick", "--json"]):
        assert main([command[0], "--config", path, *command[1:]]) == 2
        printed = capsys.readouterr()
        said = printed.out + printed.err
        assert "the newest is checkpoint-2" in said
        assert "--resume_from_checkpoint true" in said and "--overwrite_output_dir true" in said
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_going_on_and_starting_anew_are_both_one_word_away(recipe, tmp_path):
    path = recipe(**SAVES)
    assert main(["train", "--config", path]) == 0
    assert main(["train", "--config", path, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert steps_of(tmp_path / "out") == [1, 2, 3]
    assert main(["train", "--config", path, "--overwrite_output_dir", "true"]) == 0
    assert steps_of(tmp_path / "out") == [1, 2]


def test_a_torn_checkpoint_or_none_is_nothing_to_go_on_from(recipe, tmp_path):
    (tmp_path / "out" / "checkpoint-9").mkdir(parents=True)
    path = recipe(save_strategy="no", max_steps=1)
    assert main(["train", "--config", path]) == 0
    assert main(["train", "--config", path]) == 0


def test_pairs_of_a_finished_recipe_are_no_new_start(recipe, tmp_path):
    path = recipe(**SAVES, method="dpkd")
    assert main(["train", "--config", path]) == 0
    assert main(["pairs", "--config", path]) == 0
    assert (tmp_path / "out" / "pairs.jsonl").is_file()


@pytest.mark.parametrize(
    ("settings", "resume", "warned"),
    [({}, None, True), ({"overwrite_output_dir": True}, None, False), ({}, True, False)],
    ids=str,
)
def test_python_is_warned(make_trainer, caplog, settings, resume, warned):
    first = make_trainer(lmbda=0.0, **SAVES)
    first.train()
    with caplog.at_level(logging.WARNING):
        make_trainer(lmbda=0.0, **SAVES | {"max_steps": 3}, **settings).train(resume_from_checkpoint=resume)
    assert ("Starting anew in" in caplog.text) is warned
    assert not warned or "train(resume_from_checkpoint=True)" in caplog.text


def test_training_on_with_one_trainer_is_no_new_start(make_trainer, caplog):
    trainer = make_trainer(lmbda=0.0, **SAVES)
    trainer.train()
    trainer.train()
    assert "Starting anew" not in caplog.text
