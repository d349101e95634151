"""Uploads from the command line, to a Hub on loopback."""

from __future__ import annotations

import json

import pytest
from datasets import load_dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from distill_trainers.cli import main
from distill_trainers.evaluation.results import EvaluationResults, MeasureInfo, MeasureScore, ModelResults
from distill_trainers.trainers.lifecycle.callbacks import InterruptCallback

from_teacher = {"model_name_or_path": None, "student_init": {"from_teacher": True, "keep_layers": 1}}


def push_settings(tmp_path, **changes):
    private = {"seq_kd": True, "lmbda": 0.0, "teacher_cache": str(tmp_path / "out" / "cache")}
    return {"push_to_hub": True, "hub_model_id": "student", "hub_strategy": "end", **from_teacher, **private, **changes}


def test_a_whole_run_is_uploaded_without_what_is_private(recipe, tmp_path, hub, capsys):
    assert main(["train", "--config", recipe(**push_settings(tmp_path, eval_fraction=4))]) == 0
    files = hub.files("me/student")
    assert {"model.safetensors", "README.md", "metrics.json", "tokenizer.json", "plots/loss.png"} <= files.keys()
    for private in ("completions", "student_init", "cache"):
        assert any((tmp_path / "out" / private).iterdir())
    assert {name.split("/")[0] for name in files if "/" in name} == {"plots"}
    assert "/me/student . Files:" in capsys.readouterr().out
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    card = files["README.md"].decode()
    assert "into 1 of the layers of `teacher`" in card and "train.jsonl" in card and "student_init:" in card
    assert AutoModelForCausalLM.from_pretrained("me/student").config.num_hidden_layers == 1


def test_uploads_with_checkpoints_leave_the_same_out(recipe, tmp_path, hub):
    changes = {"save_strategy": "steps", "save_steps": 2, "completions_dir": str(tmp_path / "out" / "answers")}
    changes["hub_strategy"] = "every_save"
    assert main(["train", "--config", recipe(**push_settings(tmp_path, **changes))]) == 0
    repo = hub.repos[("models", "me/student")]
    assert any("Training in progress" in message for message in repo.messages)
    names = set().union(*repo.commits.values())
    assert {name.split("/")[0] for name in names if "/" in name} <= {"plots"} and "training_args.bin" not in names


def test_an_interrupted_run_is_not_uploaded_at_its_end(recipe, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr(InterruptCallback, "on_step_begin", lambda self, *a, **k: setattr(self, "asked", True))
    assert main(["train", "--config", recipe(**push_settings(tmp_path))]) == 0
    assert "Stopped at step 1" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file() and not hub.files("me/student")


def test_a_merged_adapter_is_uploaded_whole(recipe, tmp_path, hub):
    changes = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "merge_adapter": True}
    assert main(["train", "--config", recipe(**push_settings(tmp_path, **changes))]) == 0
    files = hub.files("me/student")
    assert {"model.safetensors", "metrics.json", "README.md", "plots/loss.png"} <= files.keys()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and "adapter_config.json" not in files


def test_an_adapter_of_a_local_base_is_refused_before_anything_is_loaded(recipe, tmp_path, hub, capsys):
    settings = recipe(push_to_hub=True, hub_model_id="student", use_peft=True, lora_target_modules=["q_proj", "v_proj"])
    assert main(["train", "--config", settings, "--dry_run", "true"]) == 2
    assert "which nobody else can load. Set `merge_adapter: true`" in capsys.readouterr().err
    assert not hub.requests


def test_a_dry_run_sees_a_wrong_token(recipe, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["train", "--config", recipe(**push_settings(tmp_path)), "--dry_run", "true"]) == 2
    assert "does not accept the token (401)" in capsys.readouterr().err


def test_a_failed_upload_leaves_the_student_and_can_be_made_up_for(recipe, tmp_path, hub, capsys):
    hub.breaks = 1000
    assert main(["train", "--config", recipe(**push_settings(tmp_path))]) == 1
    message = capsys.readouterr().err
    assert "Could not upload to 'me/student': the Hub cannot be reached" in message
    command = message.split("`")[1].split()
    assert command[:2] == ["distill-trainers", "push"]
    hub.breaks = 0
    assert main(command[1:]) == 0
    assert "model.safetensors" in hub.files("me/student")


def test_push_puts_the_scores_of_an_evaluation_into_the_card(recipe, tmp_path, hub):
    assert main(["train", "--config", recipe()]) == 0
    student = ModelResults("s", "student", "out", "f", {"rouge_l": MeasureScore(31.0, 29.0, 33.0)})
    results = EvaluationResults([student], {"rouge_l": MeasureInfo("Rouge-L", "F x 100", True)}, {}, {"name": "rows"})
    results.save(tmp_path / "out" / "evaluation")
    assert main(["push", str(tmp_path / "out"), "--repo", "team/student", "--private"]) == 0
    (score,) = ModelCard.load("team/student").data.eval_results
    assert score.metric_value == 31.0 and hub.repos[("models", "team/student")].private


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda folder: None, "There is no run and no .jsonl file"),
        (lambda folder: folder.mkdir(), "holds no model"),
        (
            lambda folder: (
                folder.mkdir(),
                (folder / "adapter_model.safetensors").write_bytes(b""),
                (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/x/base"})),
            ),
            "an adapter for the local folder",
        ),
    ],
)
def test_what_cannot_be_pushed(tmp_path, hub, capsys, made, message):
    made(tmp_path / "run")
    assert main(["push", str(tmp_path / "run"), "--repo", "me/run"]) == 2
    assert message in capsys.readouterr().err and not hub.repos


def test_pairs_are_uploaded_as_they_are_made(recipe, tmp_path, hub, saved, capsys):
    settings = recipe(temperature=1.0)
    assert main(["pairs", "--config", settings, "--pairs_repo", "pairs", "--hub_private_repo", "true"]) == 0
    pulled = load_dataset("me/pairs", split="train")
    kept = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert pulled["chosen"][:] == [pair["chosen"] for pair in kept]
    assert hub.repos[("datasets", "me/pairs")].private
    assert not any(str(saved.root).encode() in content for content in hub.files("me/pairs", kind="datasets").values())


def test_pairs_for_a_wrong_token_are_not_begun(recipe, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    monkeypatch.setattr("distill_trainers.cli.pairs._teacher_answers", lambda *a: pytest.fail("the teacher was asked"))
    assert main(["pairs", "--config", recipe(), "--pairs_repo", "me/pairs"]) == 2
    assert "hf auth login" in capsys.readouterr().err
