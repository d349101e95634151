"""Recipes in which the student is its own teacher: planned, examined, trained, and refused with another one."""

import json

import pytest

from distill_trainers.cli import main
from distill_trainers.cli.train import run
from distill_trainers.recipe.parse import parse_recipe


@pytest.mark.parametrize(
    ("settings", "said", "held"),
    [
        ({"self_teacher": "ema", "self_teacher_decay": 0.9}, "an average of the student", True),
        ({"self_teacher": True, "use_peft": True}, "the student before training", False),
        ({"self_teacher": "initial"}, "the student before training", True),
        ({"self_teacher": "live"}, "the student itself", False),
    ],
    ids=["ema", "initial-adapter", "initial-copy", "live"],
)
def test_a_recipe_without_a_teacher_is_planned_examined_and_trained(recipe, capsys, settings, said, held):
    path = recipe(teacher_model_name_or_path=None, lmbda=1.0, max_steps=2, lora_target_modules="all-linear", **settings)
    assert main(["train", "--config", path, "--dry_run", "true"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert main(["doctor", "--config", path, "--quick", "--json"]) == 0
    case = json.loads(capsys.readouterr().out)
    assert case["memory"]["held"].get("teacher", 0) > 0 if held else "teacher" not in case["memory"]["held"]
    logged = run(parse_recipe(["--config", path])).state.log_history
    assert any(log.keys() >= {"loss", "entropy", "completion_length"} for log in logged)


def test_a_teacher_beside_the_student_is_refused_before_anything_is_loaded(recipe, capsys, monkeypatch):
    monkeypatch.setattr("distill_trainers.trainers.base.load_student", lambda *args: pytest.fail("loaded"))
    assert main(["train", "--config", recipe(self_teacher="ema"), "--dry_run", "true"]) == 2
    assert "the student is its own. Leave one of them out" in " ".join(capsys.readouterr().err.split())
