"""Recipes: parsing, overrides, the plan, and what a run leaves."""

import json
from pathlib import Path

import pytest

from distill_trainers.cli import main
from distill_trainers.cli.plan import make_plan, print_plan
from distill_trainers.recipe.checks import student_identity
from distill_trainers.recipe.parse import parse_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))


def test_recipes_exist():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_recipe_parses_and_says_what_it_needs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = parse_recipe(["--config", str(path), "--use_cpu", "true"])
    assert parsed.args.lr_scheduler_type == "cosine"
    assert parsed.args.weight_decay == pytest.approx(1e-4)
    made = parsed.run.dataset.startswith("runs/")  # by a stage of `distill-trainers rationales`
    if not made and parsed.run.dataset.count("/") != 1:  # a local file, not a Hub id
        assert (ROOT / parsed.run.dataset).is_file()
    assert (path.parent / "README.md").is_file()


def test_command_line_overrides_the_recipe(recipe):
    parsed = parse_recipe(
        ["--config", recipe(), "--learning_rate", "0.25", "--lmbda", "0", "--divergence", "reverse_kl"]
    )
    assert (parsed.args.learning_rate, parsed.args.lmbda, parsed.args.divergence) == (0.25, 0.0, "reverse_kl")


def test_numbers_written_as_yaml_strings_become_numbers(recipe):
    assert parse_recipe(["--config", recipe(learning_rate="1e-5")]).args.learning_rate == 1e-5


def test_unknown_option_on_the_command_line_is_refused(recipe, capsys):
    assert main(["train", "--config", recipe(), "--learning_rte", "1"]) == 2
    assert "learning_rate" in capsys.readouterr().err


def test_missing_recipe_names_its_neighbours(recipe, capsys):
    path = Path(recipe())
    assert main(["train", "--config", str(path.with_name("recip.yaml"))]) == 2
    assert "recipe.yaml" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_loads_no_weights(recipe, monkeypatch, capsys):
    import distill_trainers.models as models

    monkeypatch.setattr(models, "load_causal_lm", lambda *a, **k: pytest.fail("weights were loaded"))
    assert main(["train", "--config", recipe(max_steps=-1, num_train_epochs=2), "--dry_run", "true"]) == 0
    printed = capsys.readouterr().out
    assert "12" in printed and "24" in printed  # 24 rows in batches of 4, twice
    assert "nothing was trained" in printed


def test_steps_of_completions_that_the_teacher_will_write_are_an_estimate(recipe, capsys):
    changes = {"per_device_train_batch_size": None, "per_device_train_tokens": 80, "lmbda": 0.0, "max_steps": -1}
    plan = make_plan(parse_recipe(["--config", recipe(**changes, num_train_epochs=1, seq_kd=True)]))
    short = make_plan(parse_recipe(["--config", recipe(**changes, num_train_epochs=1)]))
    assert plan.steps > short.steps, "as many tokens as it may write are counted"
    print_plan(plan)
    assert "an estimate" in capsys.readouterr().out and not short.steps_are_estimated


def test_steps_of_batches_counted_in_tokens_are_planned_and_on_the_card(recipe, tmp_path):
    changes = {"per_device_train_batch_size": None, "per_device_train_tokens": 50, "lmbda": 0.0, "max_steps": -1}
    path = recipe(**changes, num_train_epochs=1, verify_saved=False)
    plan = make_plan(parse_recipe(["--config", path]))
    assert plan.tokens_per_step == pytest.approx(plan.train_tokens / plan.steps) and plan.steps > 2
    assert main(["train", "--config", path]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`per_device_train_tokens`" in card and "per_device_train_batch_size" not in card
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == plan.steps


def test_train_saves_student_card_and_scores(recipe, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["train", "--config", recipe(eval_fraction=4)]) == 0
    out = tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["eval_kl"] > 0 and metrics["train_loss"] > 0
    card = (out / "README.md").read_text()
    assert "2306.13649" in card and f"{metrics['eval_kl']:.4f}" in card
    assert "train step 3/3" in capsys.readouterr().out


def test_student_made_from_the_teacher_is_made_once(recipe, tmp_path):
    changes = {"model_name_or_path": None, "student_init": {"from_teacher": True, "keep_layers": 1}}
    assert main(["train", "--config", recipe(**changes)]) == 0
    made = tmp_path / "out" / "student_init" / "model.safetensors"
    first = made.stat().st_mtime_ns
    assert main(["train", "--config", recipe(**changes)]) == 0
    assert made.stat().st_mtime_ns == first
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1


def test_a_student_of_another_revision_is_another(recipe):
    """The folder of one is no student of the other, and is made anew."""
    changes = {"model_name_or_path": None, "student_init": {"from_teacher": True, "keep_layers": 1}}
    told = {}
    for name, kwargs in {
        "plain": {},
        "revision": {"teacher_model_init_kwargs": {"revision": "v2"}},
        "dtype": {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
        "token": {"teacher_model_init_kwargs": {"token": "hf_secret"}},
        "old spelling": {"teacher_model_init_kwargs": {"torch_dtype": "bfloat16"}},
    }.items():
        told[name] = json.dumps(student_identity(parse_recipe(["--config", recipe(**changes, **kwargs)])))
    assert told["token"] == told["plain"] and told["dtype"] == told["old spelling"] and len(set(told.values())) == 3


def test_resume_from_the_command_line(recipe):
    path = recipe(save_strategy="steps", save_steps=2, max_steps=2)
    assert main(["train", "--config", path]) == 0
    assert main(["train", "--config", path, "--max_steps", "4", "--resume_from_checkpoint", "true"]) == 0


def test_unknown_command(capsys):
    assert main(["tarin"]) == 2
    assert "train" in capsys.readouterr().err


def test_plain_text_is_named_in_the_recipe(recipe, tmp_path, capsys):
    """Planned, trained on, and refused for a method that has no use for it."""
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{n}+1={n + 1}"}) for n in range(20, 27)))
    path = recipe(method="minillm", pretraining_dataset=str(text), num_inner_epochs=2, max_steps=-1, num_train_epochs=1)
    assert main(["train", "--config", path, "--dry_run", "true"]) == 0
    printed = capsys.readouterr().out
    assert "Rows of plain text" in printed and " 7 " in printed
    assert any("Optimiser steps" in line and " 12 " in line for line in printed.splitlines()), (
        "24 rows, 4 a step, twice"
    )
    assert main(["train", "--config", path]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 12 and state["log_history"][0]["pretraining"] > 0
    assert main(["train", "--config", recipe(pretraining_dataset=str(text))]) == 2
    assert "method: gkd" in capsys.readouterr().err
