"""`distill-trainers prune`, and recipes whose students are narrower than their teachers."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from distill_trainers.cli import main
from distill_trainers.cli.plan import make_plan
from distill_trainers.cli.train import build_trainer
from distill_trainers.recipe.parse import parse_recipe
from distill_trainers.students import made_of

NARROW = {"from_teacher": True, "keep_layers": 1, "intermediate_size": 32, "importance_batches": 1}


def made(**student_init):
    return {"model_name_or_path": None, "student_init": student_init}


@pytest.fixture
def teacher_size(saved):
    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(saved.teacher).parameters())


@pytest.mark.slow
def test_a_recipe_trains_a_narrower_student(recipe, tmp_path):
    assert main(["train", "--config", recipe(**made(**NARROW), lmbda=0.0)]) == 0
    start = tmp_path / "out" / "student_init"
    config, trained = AutoConfig.from_pretrained(start), AutoConfig.from_pretrained(tmp_path / "out")
    for name in ("num_hidden_layers", "intermediate_size"):
        expected = {"num_hidden_layers": 1, "intermediate_size": 32}[name]
        assert getattr(config, name) == getattr(trained, name) == expected
    told = json.loads((start / "pruning.json").read_text())
    assert len(told["kept"]["units"][0]) == 32 and len(told["importance"]["layers"]) > 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1 of the layers of `teacher`, pruned to intermediate_size 32" in card


def test_plan_and_run_agree_on_a_narrower_student(recipe):
    parsed = parse_recipe(["--config", recipe(**made(**NARROW))])
    plan, student = make_plan(parsed), build_trainer(parsed).model
    assert plan.student_parameters == sum(p.numel() for p in student.parameters()) and plan.tried == []


def test_a_number_of_parameters_is_planned_printed_and_pruned(recipe, tmp_path, capsys, teacher_size):
    asked = 0.8 * teacher_size
    path = recipe(**made(from_teacher=True, parameters=asked, importance_batches=1))
    assert main(["prune", "--config", path, "--dry_run", "true"]) == 0
    printed = capsys.readouterr().out
    assert "to be tried" in printed and "the one of those above that loses least" in " ".join(printed.split())
    assert not (tmp_path / "out").exists()
    assert main(["prune", "--config", path]) == 0
    printed = capsys.readouterr().out
    assert "Tried " in printed and "KL " in printed
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student_init")
    size = sum(p.numel() for p in student.parameters())
    assert abs(size - asked) <= 0.08 * asked
    kls = [
        each["kl"]
        for each in json.loads((tmp_path / "out" / "student_init" / "pruning.json").read_text())["candidates"]
    ]
    assert kls == sorted(kls)
    plan = make_plan(parse_recipe(["--config", path]))  # what has been chosen is known now
    assert (plan.student_parameters, plan.tried) == (size, [])


def test_sizes_on_the_command_line_take_the_place_of_the_recipes(recipe, tmp_path):
    assert main(["prune", "--config", recipe(**made(**NARROW)), "--intermediate_size", "24"]) == 0
    config = AutoConfig.from_pretrained(tmp_path / "out" / "student_init")
    assert config.intermediate_size == 24 and config.num_hidden_layers > 1


def test_a_recipe_with_a_student_of_its_own_is_pruned_where_sizes_are_given(recipe, tmp_path, capsys):
    assert main(["prune", "--config", recipe()]) == 2
    assert "Got a recipe without `student_init`, and no sizes" in capsys.readouterr().err
    assert main(["prune", "--config", recipe(), "--intermediate_size", "24"]) == 0
    assert (tmp_path / "out" / "student_init" / "config.json").is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"intermediate_size": 30}, "Got intermediate_size=30; expected a multiple of 8"),
        ({"parameters": 1e12}, "expected a number up to"),
        ({"parameters": 2e4, "hidden_size": 8}, "beside hidden_size"),
        ({"parameters": "many"}, "parameters"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"strategy": "even", "intermediate_size": 24}, "no layers to space"),
        ({"keep_layers": 99, "intermediate_size": 24}, "keep 99 of"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_weights_are_read(recipe, capsys, monkeypatch, settings, words):
    monkeypatch.setattr("distill_trainers.models.load_causal_lm", None)
    assert main(["train", "--config", recipe(**made(from_teacher=True, **settings))]) == 2
    assert words in capsys.readouterr().err


def test_what_a_student_was_made_of_is_said():
    assert made_of({"keep_layers": [0, 3]}, "x") == "2 of the layers of x"
    assert made_of({"hidden_size": 64, "num_experts": 4}, "x") == "x pruned to hidden_size 64, num_experts 4"
    assert made_of({"parameters": 3e9}, "x") == "x pruned to 3,000,000,000 parameters"
