"""Keys of recipes: unknown ones all at once and before torch is imported, TRL's names taken for ours."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import trl
import yaml
from trl import ModelConfig
from trl.experimental import gkd as trl_gkd

from distill_trainers import GKDConfig
from distill_trainers.exceptions import ConfigurationError, refuse_unknown_keys
from distill_trainers.recipe import known_keys
from distill_trainers.recipe.parse import RecipeArguments, parse_recipe
from distill_trainers.trainers import METHODS
from distill_trainers.trl_names import HARMLESS, KEYS, OLDER, REFUSED, other_names


@pytest.mark.parametrize("method", METHODS)
def test_what_is_read_from_the_source_is_what_the_classes_have(method, monkeypatch):
    monkeypatch.delitem(sys.modules, "distill_trainers.trainers")
    found = known_keys.known_keys(method, RecipeArguments)
    classes = (RecipeArguments, METHODS[method][0], ModelConfig)
    assert found == {f.name for cls in classes for f in fields(cls) if f.init}


def test_a_method_of_somebody_else_is_left_to_its_classes(monkeypatch):
    monkeypatch.delitem(sys.modules, "distill_trainers.trainers")
    assert known_keys.known_keys("theirs", RecipeArguments) is None


def test_unknown_keys_are_told_at_once_and_before_torch(tmp_path):
    recipe = {"method": "gkd", "learning_rat": 1, "completion_only_loss": False, "vllm_mode": "server", "lmda": 0.5}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code = (
        "import sys; from distill_trainers.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & sys.modules.keys(); "
        "sys.exit(9 if heavy else status)"
    )
    command = [sys.executable, "-c", code, "train", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == 2, done.stderr
    for told in (
        "'learning_rat': Did you mean 'learning_rate'",
        "'lmda': Did you mean 'lmbda'",
        "'completion_only_loss': That is a setting of TRL without a counterpart here. Instead: the prompt is never",
        "'vllm_mode': That is a setting of TRL. Instead: set `vllm_kwargs: {mode: …}`",
    ):
        assert told in done.stderr


def test_names_of_trl_are_taken(recipe):
    path = recipe(dataset_train_split="train", max_new_tokens=None, max_completion_length=5, torch_dtype="float32")
    content = yaml.safe_load(Path(path).read_text())
    content["dataset_name"] = content.pop("dataset")
    Path(path).write_text(yaml.safe_dump(content))
    parsed = parse_recipe(["--config", path])
    assert parsed.run.dataset == content["dataset_name"] and parsed.run.dataset_split == "train"
    assert parsed.args.max_new_tokens == 5 and parsed.model.dtype == "float32" and parsed.run.eval_dataset is None


def test_names_of_trl_are_taken_from_the_command_line(recipe):
    options = ["--max-completion-length", "6", "--dataset_train_split=train[:3]", "--max_seq_length", "30"]
    parsed = parse_recipe(["--config", recipe(), *options])
    assert (parsed.args.max_new_tokens, parsed.args.max_length, parsed.run.dataset_split) == (6, 30, "train[:3]")


def test_a_test_split_of_trl_is_of_the_same_data(recipe):
    parsed = parse_recipe(["--config", recipe(dataset_test_split="heldout")])
    assert (parsed.run.eval_dataset, parsed.run.eval_split) == (parsed.run.dataset, "heldout")


@pytest.mark.parametrize(("theirs", "ours"), [("dataset_name", "dataset"), ("max_completion_length", "max_new_tokens")])
def test_both_names_are_refused(recipe, theirs, ours):
    with pytest.raises(ConfigurationError, match=f"`{theirs}: .* and `{ours}: .*two names of one setting"):
        parse_recipe(["--config", recipe(**{theirs: 7})])


def test_every_name_of_the_tables_says_what_to_do(recipe):
    """Of those that recipes do not know by themselves."""
    known = known_keys.known_keys("gkd") or {f.name for f in fields(METHODS["gkd"][0])}
    known |= {f.name for cls in (RecipeArguments, ModelConfig) for f in fields(cls)}
    assert set(KEYS.values()) <= known
    names = [name for name in {**REFUSED, **HARMLESS} if name not in known]
    with pytest.raises(ConfigurationError) as error:
        parse_recipe(["--config", recipe(**dict.fromkeys(names, "x"))])
    assert all(f"{name!r}: That is a setting of TRL" in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("theirs", "method"),
    [("SFTConfig", "gkd"), ("DPOConfig", "dpkd"), ("DistillationConfig", "gkd"), ("GKDConfig", "gkd")],
)
def test_every_setting_of_trl_is_known_or_says_what_to_do(theirs, method):
    config = getattr(trl, theirs, None) or getattr(trl_gkd, theirs)
    known = {f.name for f in fields(METHODS[method][0])}
    unknown = [f.name for f in fields(config) if f.name not in known]
    with pytest.raises(ConfigurationError) as error:
        refuse_unknown_keys(unknown, known, "a config")
    told = str(error.value)
    assert not [name for name in unknown if f"{name!r}: That is" not in told]


@pytest.mark.parametrize("name", OLDER)
def test_what_transformers_had_is_told(name):
    with pytest.raises(ConfigurationError, match="older versions of transformers. Instead: set"):
        GKDConfig(**{name: True})


def test_the_newer_name_of_checkpointing_is_read_by_an_older_transformers():
    """Recipes have transformers 5.23's name; 5.19 has the older one alone."""
    names = other_names({"gradient_checkpointing", "gradient_checkpointing_kwargs"})
    assert known_keys.with_our_names({"activation_checkpointing": True}, names) == {"gradient_checkpointing": True}
    assert "activation_checkpointing" not in other_names({"activation_checkpointing", "gradient_checkpointing"})
