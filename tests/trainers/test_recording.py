"""`run.json`: what was run and what it cost, over all sessions, without paths or secrets."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from distill_trainers import GKDConfig
from distill_trainers.run_files import read_record
from distill_trainers.trainers.lifecycle.recording import changed_settings, energy_joules


def test_a_run_leaves_its_record(make_trainer, tmp_path):
    trainer = make_trainer(divergence="forward_kl", hub_token="secret-token")
    trainer.train()
    record = read_record(tmp_path / "out")
    assert record["method"] == "GKD" and record["paper"]["id"] == "2306.13649" and record["processes"] == 1
    assert record["student"] == "LlamaForCausalLM" and record["student_parameters"] > 0
    assert record["versions"]["torch"] == torch.__version__ and record["device"] == "cpu"
    assert record["recipe"]["divergence"] == "forward_kl" and record["recipe"]["max_new_tokens"] == 4
    (session,) = record["sessions"]
    assert (session["from_step"], session["to_step"]) == (0, 3) and session["seconds"] > 0
    assert session["peak_mib"] > 10 and session["energy_joules"] is None
    text = (tmp_path / "out/run.json").read_text()
    assert str(tmp_path) not in text and "secret" not in text


def test_a_resumed_run_adds_a_session(make_trainer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(max_steps=2, **settings).train()
    make_trainer(max_steps=4, **settings).train(resume_from_checkpoint=True)
    sessions = read_record(tmp_path / "out")["sessions"]
    assert [(each["from_step"], each["to_step"]) for each in sessions] == [(0, 2), (2, 4)]
    make_trainer(max_steps=1, **settings).train()  # anew
    assert [each["to_step"] for each in read_record(tmp_path / "out")["sessions"]] == [1]


def test_settings_say_nothing_of_the_machine(tmp_path):
    args = GKDConfig(
        output_dir=str(tmp_path / "out"), teacher_cache=str(tmp_path / "kept"), use_cpu=True, learning_rate=0.5,
        hub_token="secret", model_init_kwargs={"dtype": "float32", "token": "secret"},
    )  # fmt: skip
    settings = changed_settings(args)
    assert settings["teacher_cache"] == "kept" and settings["learning_rate"] == 0.5
    assert settings["model_init_kwargs"] == {"dtype": "float32"}
    assert str(tmp_path) not in json.dumps(settings) and "secret" not in json.dumps(settings)
    assert "gradient_checkpointing" not in settings and "accelerator_config" not in settings  # not set by anyone


def test_a_damaged_record_is_none(tmp_path):
    for text in ("{", "[]", '{"format": "other"}'):
        (tmp_path / "run.json").write_text(text)
        assert read_record(tmp_path) == {}


def test_energy_is_what_the_driver_counts(monkeypatch):
    """By a stand-in for the driver's library; the device itself is not here."""
    counted = {"GPU-1234": 5_000_000}
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: counted[handle],  # millijoules
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    assert energy_joules(torch.device("cuda", 0)) == pytest.approx(5000)
    counted.clear()  # a device without such a counter
    assert energy_joules(torch.device("cuda", 0)) is None
    assert energy_joules(torch.device("cpu")) is None
