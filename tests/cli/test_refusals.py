"""What is wrong with a recipe is said in one line, before any weights are loaded, by a run and a dry run alike."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from distill_trainers import GKDConfig, models
from distill_trainers.cli import main
from distill_trainers.exceptions import ConfigurationError
from distill_trainers.recipe.parse import RecipeArguments, parse_recipe
from distill_trainers.value_types import check_value_types


@pytest.fixture(params=["run", "dry run"])
def refused(request, recipe, monkeypatch, capsys):
    """`refused(changes, *options)`: the one line of an error that comes before weights, with exit status 2."""

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded before the recipe was refused")

    monkeypatch.setattr(models, "load_causal_lm", load)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)

    def message(changes, *options):
        dry = ["--dry_run", "true"] if request.param == "dry run" else []
        assert main(["train", "--config", recipe(**changes), *options, *dry]) == 2
        printed = capsys.readouterr()
        assert "usage" not in printed.out + printed.err
        (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert printed.err.endswith(line + "\n")
        return line

    return message


from_teacher = {"from_teacher": True}
ROOT = Path(__file__).parents[2]
made = {"model_name_or_path": None, "student_init": {**from_teacher, "keep_layers": 1}}


def made_with(**settings):
    return {"model_name_or_path": None, "student_init": {**from_teacher, "keep_layers": 1, **settings}}


NAMES = ["model_name_or_path", "teacher_model_name_or_path", "dataset", "eval_dataset", "teacher_cache"]
NAMES += ["output_dir", "resume_from_checkpoint"]


@pytest.mark.parametrize("setting", NAMES)
@pytest.mark.parametrize(
    "name", ["a/" + "x y " * 100, "x/" * 3000, "~nobody-here/folder"], ids=["long", "deep", "another's home"]
)
def test_a_name_that_no_file_can_have(refused, setting, name):
    assert setting in (line := refused({setting: name})) or name[:20] in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rat": 1e-3}, "Did you mean 'learning_rate'"),
        ({"method": "gdk"}, "expected one of gkd"),
        ({"method": ["gkd"]}, "expected one of gkd"),
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
        ({"column_mapping": {"question": "prompt"}, **made}, "question"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_dataset"),
        ({"eval_strategy": "steps", "eval_steps": 1, **made}, "eval_dataset"),
        (made_with(keep_layers=[0, 99]), "[0, 99]"),
        (made_with(keep_layers=[1, 1]), "[1, 1]"),
        (made_with(keep_layers=3), "keep 3 of 2 layers"),
        (made_with(keep_layers="two"), 'keep_layers: "two"'),
        (made_with(importance_batches="few"), 'importance_batches: "few"'),
        ({**made_with(hidden_size=16), "hidden_weight": 1.0}, "a student of width 16 and a teacher of width 48"),
        ({**made, "hidden_weight": 1.0, "hidden_layers": [0, 1]}, "expected 1 different layers"),
        ({**made_with(keep_layers=None, parameters=15000), "hidden_weight": 1.0}, "narrower students, of [32], would"),
        ({"load_in_4bit": True}, "use_peft"),
        ({"use_peft": True, "lora_target_modules": ["q_prj"]}, "q_prj"),
        ({"teacher_model_name_or_path": "Some/Typo"}, "teacher model 'Some/Typo' cannot be read"),
        ({"model_name_or_path": "Some/Typo"}, "student model 'Some/Typo' cannot be read"),
        ({"eval_fraction": 0}, "eval_fraction: 0"),
        ({"eval_fraction": 1.5}, "eval_fraction: 1.5"),
        ({"eval_fraction": -0.1}, "eval_fraction: -0.1"),
        ({"max_train_samples": 0}, "max_train_samples: 0"),
        ({"eval_fraction": 4, "eval_strategy": "epoch", "early_stopping_patience": 0}, "early_stopping_patience: 0"),
    ],
)
def test_contradictions(refused, changes, expected):
    assert expected in refused(changes)


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("learning_rate", True, "learning_rate: true`; expected a number"),
        ("learning_rate", "abc", "learning_rate"),
        ("max_length", 12.5, "max_length: 12.5`; expected a whole number"),
        ("max_steps", [1], "max_steps: [1]`; expected a whole number"),
        ("max_steps", "ten", "max_steps"),
        ("lmbda", "half", "lmbda"),
        ("seq_kd", "maybe", "seq_kd"),
        ("bf16", 3, "bf16: 3`; expected true or false"),
        ("dataset", 5, "dataset: 5`; expected text or null"),
        ("output_dir", 7, "output_dir: 7`; expected text"),
        ("student_init", 12, "student_init: 12`; expected a mapping"),
        ("student_init", ["a"], "student_init"),
        ("student_init", "twelve", "student_init"),
        ("column_mapping", "question", "column_mapping"),
        ("column_mapping", {"question": 1}, "column_mapping"),
        ("teacher_model_init_kwargs", "bf16", "teacher_model_init_kwargs"),
        ("stop_strings", [5], "stop_strings: [5]`; expected a list of texts"),
        ("hidden_layers", [0, 1.0], "hidden_layers: [0, 1.0]`; expected a list of whole numbers"),
        ("hidden_layers", "0,1", "got '0,1'; expected whole numbers: `--hidden_layers 1 2`, or in YAML `[1, 2]`"),
        ("teacher_weights", {0: 1.0}, "teacher_weights: {0: 1.0}`; expected a mapping of names to numbers"),
        ("eval_strategy", False, "put the word in quotes"),
    ],
)
def test_values_of_the_wrong_type(refused, setting, value, expected):
    line = refused({setting: value})
    assert expected in line and setting in line and len(line) < 300


def test_null_where_a_number_is_due(recipe, capsys):
    path = Path(recipe())
    path.write_text(path.read_text() + "temperature: null\n")
    assert main(["train", "--config", str(path)]) == 2
    assert "temperature: null`; expected a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--learning_rate", "abc"], "`learning_rate`: got 'abc'; expected a number."),
        (["--column_mapping", "{a: b}"], "column_mapping"),
        (["--divergence"], "divergence"),
        (["--learning_rte", "1"], "learning_rate"),
        (["--resume_from_checkpoint", "true"], "no complete checkpoint"),
        (["--resume_from_checkpoint", "no/such/checkpoint"], "no/such/checkpoint"),
    ],
)
def test_bad_options(refused, options, expected):
    assert expected in refused({}, *options)


def test_a_checkpoint_without_its_end_is_refused(refused, tmp_path):
    half = tmp_path / "out" / "checkpoint-5"
    half.mkdir(parents=True)
    (half / "optimizer.pt").touch()
    assert "complete checkpoint" in refused({}, "--resume_from_checkpoint", str(half))


def test_a_typo_in_a_local_path_is_not_taken_for_a_hub_id(refused, saved, monkeypatch):
    monkeypatch.chdir(saved.root.parent)
    assert "is not a folder" in refused({"teacher_model_name_or_path": f"{saved.root.name}/taecher"})


@pytest.mark.parametrize("role", ["teacher_model_name_or_path", "model_name_or_path"])
def test_an_adapter_alone_is_no_model(refused, tmp_path, make_student, role):
    get_peft_model(make_student(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert "holds a PEFT adapter" in refused({role: str(tmp_path / "adapter")})


def test_quantisation_without_its_library(refused, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "bitsandbytes is not installed" in refused({"load_in_8bit": True, "use_peft": True})


def test_a_model_folder_that_transformers_does_not_know(refused, saved, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_architecture"}))
    assert "no_such_architecture" in refused({"model_name_or_path": str(folder)})


@pytest.mark.parametrize("settings", [RecipeArguments, GKDConfig, ModelConfig], ids=lambda cls: cls.__name__)
def test_every_default_is_of_its_own_type(settings):
    values = {f.name: f.default for f in fields(settings) if isinstance(f.default, (bool, int, float, str, type(None)))}
    assert len(values) > 10
    check_value_types(values, settings)


def test_text_is_only_let_through_where_it_is_parsed():
    check_value_types({"lmbda": "0.5", "other": 1}, GKDConfig, text_is_parsed=True)
    with pytest.raises(ConfigurationError, match='lmbda: "0.5"`; expected a number'):
        check_value_types({"lmbda": "0.5"}, GKDConfig)


@pytest.mark.parametrize("text", ["true", "1e-5", "'yes'"])
def test_what_yaml_reads_as_it_likes_still_arrives(recipe, text):
    path = Path(recipe())
    key = "learning_rate" if "e" in text and text[0] == "1" else "tau_squared"
    path.write_text(path.read_text() + f"{key}: {text}\n")
    value = getattr(parse_recipe([f"--config={path}"]).args, key)
    assert value == (1e-5 if key == "learning_rate" else True) and not isinstance(value, str)


def test_mappings_may_be_json(recipe):
    parsed = parse_recipe(["--config", recipe(), "--column_mapping", '{"question": "prompt"}'])
    assert parsed.args.column_mapping == {"question": "prompt"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [(["--config", "nowhere.yaml"], "There is no recipe 'nowhere.yaml'"), (["--learning_rat", "1"], "'learning_rate'")],
    ids=["recipe", "setting"],
)
def test_the_demo_looks_at_its_recipe_before_it_converts_a_teacher(wrong, told, tmp_path, monkeypatch, capsys):
    def convert(*args, **kwargs):
        raise AssertionError("the teacher was converted first")

    monkeypatch.setattr("distill_trainers.gguf.import_gguf", convert)
    monkeypatch.chdir(ROOT)
    wheel = ["--teacher-wheel", "some.whl", "--output-dir", str(tmp_path)]
    assert main(["demo", *wheel, *wrong]) == 2
    assert told in capsys.readouterr().err
