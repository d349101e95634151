"""Recipes with several teachers: the shipped one on a tiny model, its plan, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from distill_trainers.cli import main
from distill_trainers.recipe.parse import parse_recipe
from distill_trainers.toy import tiny_llama

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "recipes/smollm2-135m/two_experts.yaml"
NAMES = ("addition", "subtraction")


@pytest.fixture
def experts(tmp_path, make_tokenizer):
    """Options of the shipped recipe that put a tiny model and two adapters of it in the place of SmolLM2's."""
    tokenizer, folder = make_tokenizer(), str(tmp_path / "base")
    tokenizer.save_pretrained(folder)
    tiny_llama(tokenizer, 32, 2).save_pretrained(folder)
    for name in NAMES:
        adapted = get_peft_model(
            tiny_llama(tokenizer, 32, 2), LoraConfig(target_modules="all-linear", init_lora_weights=False)
        )
        adapted.save_pretrained(tmp_path / name)
    teachers = {name: {"teacher_model_name_or_path": folder, "teacher_adapter": str(tmp_path / name)} for name in NAMES}
    options = ["--model_name_or_path", folder, "--teachers", json.dumps(teachers), "--max_steps", "2"]
    return [*options, "--output_dir", str(tmp_path / "out"), "--doctor", "false"]


@pytest.mark.slow
def test_the_shipped_recipe_is_planned_and_runs(experts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command = ["train", "--config", str(SHIPPED), *experts]
    assert main([*command, "--dry_run", "true"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "addition, subtraction" in said and "Memory: teacher addition" in said
    assert "Memory: teacher subtraction" not in said, "it is an adapter on the same base"
    assert main(["doctor", "--config", str(SHIPPED), *experts, "--quick", "true"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "There are several teachers (addition, subtraction)" in said and "on weights that are held" in said
    assert main(command) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert all(metrics[f"eval_kl/{name}"] > 0 for name in NAMES)
    assert sum(metrics[f"eval_tokens/{name}"] for name in NAMES) == metrics["eval_tokens"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "teachers:" in card and str(tmp_path) not in card
    told = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert told["teacher"] is None and told["several_teachers"] == list(NAMES)


def test_its_rows_are_right():
    for line in (ROOT / parse_recipe(["--config", str(SHIPPED)]).run.dataset).read_text().splitlines():
        row = json.loads(line)
        a, sign, b = row["prompt"][0]["content"].removeprefix("What is ").rstrip("?").split()
        right = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert row["completion"][0]["content"] == f"{a} {sign} {b} = {right}"
        assert row["teacher"] == {"+": "addition", "-": "subtraction"}[sign]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher_model_name_or_path": "here"}, "sets both `teacher_model_name_or_path` and `teachers`"),
        ({"model_name_or_path": None, "student_init": {"from_teacher": True}}, "but names several `teachers`"),
        ({"teachers": {"math": "nowhere/at/all", "code": "here"}}, "nowhere/at/all"),
        ({"teachers": {}}, "Got `teachers: {}`; expected some, by name.*`self_teacher`"),
        ({"teachers": {"math": ["m/cmath"], "code": "here"}}, r"'math': Got \['m/cmath'\] \(list\)"),
        ({}, "Row 0 of dataset 'train'.*no column 'teacher'"),
        ({"dry_run": None, "teacher_column": "completion"}, "'completion' has '0' .str.; expected the name of a"),
    ],
)
def test_what_cannot_be_is_refused_by_name(recipe, saved, changes, expected, capsys, monkeypatch):
    monkeypatch.setattr("distill_trainers.trainers.base.load_student", lambda *a, **k: pytest.fail("loaded"))
    both = {"math": saved.teacher, "code": {"teacher_model_name_or_path": saved.teacher}}
    changes = {"teacher_model_name_or_path": None, "teachers": both, "dry_run": True, **changes}
    assert main(["train", "--config", recipe(**changes)]) == 2
    assert re.search(expected, " ".join(capsys.readouterr().err.split()))


def test_pairs_are_made_of_one_teacher_at_a_time(recipe, saved, capsys):
    assert main(["pairs", "--config", recipe(teacher_model_name_or_path=None, teachers={"math": saved.teacher})]) == 2
    assert "Make the pairs of each by a recipe of its own" in " ".join(capsys.readouterr().err.split())


def test_the_doctor_names_a_teacher_that_is_moved_away(recipe, capsys):
    """It stands for two, so its tokenizers are by name; long runs go through the doctor by themselves."""
    path = recipe(extrapolate={"reference": "initial", "scale": 1.25}, lmbda=0.0, max_steps=100)
    assert main(["doctor", "--config", path, "--quick"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "away from initial →" in said and "There are several teachers (" in said
    assert "Held: teacher teacher" in said and "Held: teacher initial" in said
    path = recipe(teacher_model_name_or_path=None, self_teacher="ema", lmbda=0.0)
    assert main(["doctor", "--config", path, "--quick"]) == 0
    assert "itself (ema) →" in " ".join(capsys.readouterr().out.split())
