"""Recipes: parsing, overrides, and refusals that come before any model is loaded."""

import json
from pathlib import Path

import pytest
import yaml

from distill_trainers.cli import main
from distill_trainers.cli.recipe import parse_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))


@pytest.fixture
def recipe(tmp_path, saved):
    """`recipe(**changes)` writes a small recipe and returns its path; a change to None drops the key."""
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(4)]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))

    def write(**changes):
        content = {
            "method": "gkd",
            "model_name_or_path": saved.student,
            "teacher_model_name_or_path": saved.teacher,
            "dataset": str(data),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "max_length": 24,
            "max_new_tokens": 4,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return str(path)

    return write


def test_recipes_exist():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_recipe_parses_and_says_what_it_needs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = parse_recipe(["--config", str(path), "--use_cpu", "true"])
    assert parsed.args.lr_scheduler_type == "cosine"
    assert parsed.args.weight_decay == pytest.approx(1e-4)
    if not parsed.run.dataset.count("/") == 1:  # a local file, not a Hub id
        assert (ROOT / parsed.run.dataset).is_file()
    assert (path.parent / "README.md").is_file()


def test_command_line_overrides_the_recipe(recipe):
    parsed = parse_recipe(
        ["--config", recipe(), "--learning_rate", "0.25", "--lmbda", "0", "--divergence", "reverse_kl"]
    )
    assert (parsed.args.learning_rate, parsed.args.lmbda, parsed.args.divergence) == (0.25, 0.0, "reverse_kl")


def test_numbers_written_as_yaml_strings_become_numbers(recipe):
    assert parse_recipe(["--config", recipe(learning_rate="1e-5")]).args.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rat": 1e-3}, "Did you mean 'learning_rate'"),
        ({"method": "gdk"}, "expected one of gkd"),
        ({"temperature": -1.0}, "temperature"),
        ({"kd_temperature": 0.0}, "kd_temperature"),
        ({"lmbda": 1.5}, "lmbda"),
        ({"divergence": "foward_kl"}, "forward_kl"),
        ({"divergence": "forward_kl", "beta": 0.5}, "beta"),
        ({"seq_kd": True, "lmbda": 1.0}, "seq_kd"),
        ({"max_new_tokens": 24, "lmbda": 0.5}, "max_new_tokens"),
        ({"teacher_model_name_or_path": None}, "names no teacher"),
        ({"model_name_or_path": None}, "names no student"),
        ({"dataset": None}, "names no data"),
        ({"student_init": {"from_teacher": True, "keep_layers": 1}}, "either loaded or made"),
        ({"model_name_or_path": None, "student_init": {"keep_layer": 1}}, "keep_layers"),
        ({"early_stopping_patience": 2}, "eval_dataset"),
        ({"streaming": True, "max_steps": -1}, "max_steps"),
        ({"dataset": "no/such/file.jsonl"}, "no such file"),
        ({"teacher_model_name_or_path": "./no/such/folder"}, "not a folder"),
        ({"column_mapping": {"question": "prompt"}}, "question"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_dataset"),
    ],
)
def test_bad_recipes_are_refused_before_models_load(recipe, changes, expected, monkeypatch, capsys):
    import distill_trainers.models as models

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the recipe was refused")

    monkeypatch.setattr(models, "load_causal_lm", refuse)
    assert main(["train", "--config", recipe(**changes)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and expected in message, message


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


def test_resume_from_the_command_line(recipe):
    path = recipe(save_strategy="steps", save_steps=2, max_steps=2)
    assert main(["train", "--config", path]) == 0
    assert main(["train", "--config", path, "--max_steps", "4", "--resume_from_checkpoint", "true"]) == 0


def test_resume_without_a_checkpoint_is_explained(recipe, capsys):
    assert main(["train", "--config", recipe(), "--resume_from_checkpoint", "true"]) == 1
    assert "no complete checkpoint" in capsys.readouterr().err


def test_unknown_command(capsys):
    assert main(["tarin"]) == 2
    assert "train" in capsys.readouterr().err
