"""What is read of a run, and what is refused."""

import json

import pytest

from distill_trainers.exceptions import CheckpointError, ConfigurationError, DatasetError
from distill_trainers.reporting.runs import read_run, read_runs


def test_a_run_is_read_whole(run_folder, made_up):
    run = read_run(run_folder(results=made_up()))
    assert run.name == "run" and run.steps == 40 and run.was_trained
    assert run.curve("loss") == [(10, 0.2), (20, 0.1), (30, pytest.approx(2 / 30)), (40, 0.05)]
    assert run.total("trained_tokens") == 2000 and run.total("nothing") is None
    assert run.record["method"] == "GKD" and run.evaluation.model("teacher").role == "teacher"


def test_an_evaluation_alone(run_folder, made_up, tmp_path):
    file = made_up().save(tmp_path / "scores")
    for path in (file, file.parent):
        run = read_run(path)
        assert run.name == "scores" and not run.was_trained and run.evaluation is not None
    made_up().save((folder := run_folder()) / "evaluation")
    assert read_run(folder).evaluation is not None
    assert read_runs([run_folder("other")], file)[0].evaluation is not None


def test_the_newest_log_wins(run_folder):
    folder = run_folder(steps=20)
    later = run_folder("later", steps=40)
    (folder / "checkpoint-40").mkdir()
    (later / "trainer_state.json").rename(folder / "checkpoint-40/trainer_state.json")
    assert read_run(folder).steps == 40
    assert read_run(folder / "checkpoint-40").steps == 40


def test_damage(run_folder):
    folder = run_folder()
    good = (folder / "trainer_state.json").read_text()
    (folder / "trainer_state.json").write_text(good[:100])
    with pytest.raises(CheckpointError, match="trainer_state.json' cannot be read.*take the file away"):
        read_run(folder)
    (folder / "checkpoint-40").mkdir()
    (folder / "checkpoint-40/trainer_state.json").write_text(good)
    run = read_run(folder)
    assert run.steps == 40 and "damaged" in run.notes[0]
    (folder / "metrics.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list, expected a dict"):
        read_run(folder)
    (folder / "metrics.json").unlink()
    (folder / "evaluation.json").write_text('{"format": "other"}')
    with pytest.raises(DatasetError, match="holds no evaluation"):
        read_run(folder)


def test_no_run_there(run_folder, tmp_path):
    run_folder("mine")
    with pytest.raises(ConfigurationError, match="no run at .*Folders beside it: mine"):
        read_run(tmp_path / "mime")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="holds no run: none of trainer_state.json"):
        read_run(tmp_path / "empty")
    with pytest.raises(ConfigurationError, match="Got no run"):
        read_runs([])


def test_samples_of_the_last_evaluation_in_training(run_folder):
    folder = run_folder()
    (folder / "metrics.json").write_text(json.dumps({"samples": [{"prompt": "demo"}, 5]}))
    assert read_run(folder).samples == [{"prompt": "demo"}]
    rows = [{"step": step, "prompt": "Why?", "student": f"at {step}"} for step in (0, 10)]
    (folder / "samples.jsonl").write_text("\n".join([*map(json.dumps, rows), '{"step": 20, "pro']))
    assert read_run(folder).samples == [rows[1]]


def test_what_is_no_number_is_no_point(run_folder):
    folder = run_folder()
    state = {"global_step": "7", "log_history": [
        {"step": 1, "loss": float("nan")}, {"step": 2, "loss": "high"}, {"step": 3, "loss": True}, {"loss": 1.0}, 5,
        {"step": 4, "loss": 0.5}]}  # fmt: skip
    (folder / "trainer_state.json").write_text(json.dumps(state))
    run = read_run(folder)
    assert run.curve("loss") == [(4, 0.5)] and run.steps == 0
    (folder / "trainer_state.json").write_text('{"log_history": 5}')
    assert read_run(folder).history == []


def test_names_tell_runs_apart(run_folder):
    paths = [run_folder("a/run"), run_folder("b/run"), run_folder("c")]
    assert [run.name for run in read_runs([paths[0], paths[2]])] == ["run", "c"]
    assert [run.name for run in read_runs(paths[:2])] == ["a/run", "b/run"]
    assert [run.name for run in read_runs([paths[0], paths[0]])] == ["run (1)", "run (2)"]
