"""A folder with checkpoints: the command and Python ask whether to go on or to start anew."""

import json

import pytest

from distill_trainers import models
from distill_trainers.cli import main
from distill_trainers.exceptions import ConfigurationError

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
    ("settings", "resume"),
    [({}, True), ({}, False), ({"overwrite_output_dir": True}, None), ({"resume_from_checkpoint": "true"}, None)],
    ids=str,
)
def test_python_goes_on_or_starts_anew_as_it_is_told(make_trainer, settings, resume):
    make_trainer(lmbda=0.0, **SAVES).train()
    changes = {"max_steps": 3, "overwrite_output_dir": False, **settings}
    again = make_trainer(lmbda=0.0, **SAVES | changes)
    again.train(resume_from_checkpoint=resume)
    goes_on = bool(resume) or "resume_from_checkpoint" in settings
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3]
    assert (again.run_checkpoints[0].endswith("checkpoint-2")) is goes_on


def test_python_is_refused_before_anything_is_overwritten(make_trainer, tmp_path):
    make_trainer(lmbda=0.0, **SAVES).train()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}
    again = make_trainer(lmbda=0.0, **SAVES, overwrite_output_dir=False)
    with pytest.raises(ConfigurationError, match=r"checkpoint-2.*checkpoint=True.*checkpoint=False.*output_dir=T"):
        again.train()
    assert before and all(path.read_bytes() == data for path, data in before.items())


def test_training_on_with_one_trainer_is_no_new_start(make_trainer):
    trainer = make_trainer(lmbda=0.0, **SAVES, overwrite_output_dir=False)
    trainer.train()
    trainer.train()
    trainer.run_checkpoints = []  # as after a call that failed before it saved
    trainer.train()
