"""Every code block of the documentation is run or read by what it is for, and every line fits.

python runs, diffs are run before and after (docs/from_trl.md) or held against the file they change, yaml is parsed as
what it is, bash by tests/test_docs.py, json as rows, and blocks without a language are diagrams that name files.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from distill_trainers import GKDConfig, GKDTrainer
from distill_trainers.cli.evaluate import parse_arguments as parse_evaluation
from distill_trainers.data.formats import detect_dataset_type
from distill_trainers.data.pairs import is_pair
from distill_trainers.recipe.parse import RecipeArguments, parse_recipe
from distill_trainers.trainers import METHODS

ROOT = Path(__file__).parents[2]


def test_languages_are_those_that_are_checked(page, blocks, languages):
    assert not [block.where for block in blocks(page) if block.language not in languages]
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks(page)), "a fence is open, or indented"


def test_lines_are_short(page, blocks):
    text = page.read_text(encoding="utf-8")
    data = {line for block in blocks(page) if block.language == "json" for line in block.code.splitlines()}
    long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 140 and line[0] != "|" and line not in data]
    assert not long, f"{page.name}: more than 140 characters in lines {long}"


# ---- python and diff ------------------------------------------------------------------------------------------------


def _run(code: str, where: str) -> dict:
    names: dict = {"__name__": "example"}
    exec(compile(code, where, "exec"), names)
    return names


def _fill_cache(world):
    """What docs/caching.md says was done before: a run that kept the teacher's answers."""
    from datasets import load_dataset

    args = GKDConfig(output_dir="first", lmbda=0.0, teacher_cache="caches/large-on-mydata", report_to="none")
    rows = load_dataset("my-org/answers", split="train")
    GKDTrainer("my-org/small", "my-org/large", args, rows).train()


def _train_adapter(world):
    """What recipes/llama-2-7b says was done before: the first stage, which leaves an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = "runs/llama-2-7b-edit-sft"
    model = AutoModelForCausalLM.from_pretrained(str(world / "my-org/small"))
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)
    AutoTokenizer.from_pretrained("my-org/small").save_pretrained(folder)


def _link_recipes(world):
    (world / "recipes").symlink_to(ROOT / "recipes")


BEFORE = {
    "docs/caching.md": _fill_cache,
    "recipes/llama-2-7b/README.md": _train_adapter,
    "recipes/smollm2-135m/README.md": _link_recipes,
}


def test_python_runs(python_block, world):
    page = str(python_block.page.relative_to(ROOT))
    if page == "docs/adding_a_method.md":
        pytest.skip("files that import each other: tests/test_docs.py runs them")
    BEFORE.get(page, lambda world: None)(world)
    names = _run(python_block.code, python_block.where)
    if page.startswith("docs/methods/"):
        _check_numbers_to_watch(python_block.page, names["trainer"])


def _check_numbers_to_watch(page, trainer):
    """Each metric in a method's table is logged by the page's own example."""
    text = page.read_text(encoding="utf-8")
    table = text[text.index("## Numbers to watch") : text.index("## What goes wrong")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 5
    assert not named - set().union(*trainer.state.log_history)


def test_diffs_hold(diff_block, world):
    lines = diff_block.code.splitlines()
    assert all(line[:1] in ("", " ", "+", "-") for line in lines)
    if diff_block.page.name == "from_trl.md":
        for side in "-+":
            shutil.rmtree("runs", ignore_errors=True)  # a folder with checkpoints is refused
            _run("\n".join(line[1:] for line in lines if line[:1] in ("", " ", side)), diff_block.where)
        return
    file = (ROOT / lines[0].removeprefix(" # ")).read_text(encoding="utf-8")
    for line in lines[1:]:
        if line.startswith(" "):
            known = ".*".join(map(re.escape, line[1:].split("...")))
            assert re.search(rf"^{known}", file, re.MULTILINE | re.DOTALL), f"{lines[0]} has no line {line!r}"


# ---- yaml -----------------------------------------------------------------------------------------------------------

WHOLE = {"model_name_or_path": "s", "teacher_model_name_or_path": "t", "dataset": "rows.jsonl", "output_dir": "runs/x"}


def test_yaml_is_a_recipe(yaml_block, tmp_path, monkeypatch):
    """Whole, or keys that a whole one is given besides; those of an evaluation; or what TRL's command reads."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    keys = yaml.safe_load(yaml_block.code)
    file = tmp_path / "settings.yaml"

    def write(settings):
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return ["--config", str(file), "--use_cpu", "true"]

    if yaml_block.code.startswith("# trl "):
        _parse_as_trl(write(keys), keys)
        return
    if "students" in keys:
        args, settings = parse_evaluation(write(keys))
        assert all(value in (getattr(args, key, None), getattr(settings, key, None)) for key, value in keys.items())
        return
    if keys.get("method", "gkd") not in METHODS:
        pytest.skip("the method of docs/adding_a_method.md, which tests/test_docs.py parses")
    whole = WHOLE | {"eval_fraction": 8} | keys
    if "eval_dataset" in keys:
        del whole["eval_fraction"]
    if keys.get("teacher_placement") == "adapter_off" or keys.keys() & {"teachers", "self_teacher"}:
        del whole["teacher_model_name_or_path"]
    if "student_init" in keys:
        del whole["model_name_or_path"]
    if "report_to" in keys:
        whole["report_to"] = "none"  # the tracker need not be installed
    parsed = parse_recipe(write(whole))
    for name, value in keys.items():
        owner = next(part for part in (parsed.run, parsed.args, parsed.model) if hasattr(part, name))
        assert name == "report_to" or getattr(owner, name) == value, name


def _parse_as_trl(argv, keys):
    from trl import DatasetMixtureConfig, DistillationConfig, ModelConfig, ScriptArguments, TrlParser

    parser = TrlParser((ScriptArguments, DistillationConfig, ModelConfig, DatasetMixtureConfig))
    script, training, model, _ = parser.parse_args_and_config(argv)
    known = {f.name for part in (script, training, model) for f in fields(part)}
    assert set(keys) <= known and script.dataset_name == keys["dataset_name"]


# ---- json and diagrams ----------------------------------------------------------------------------------------------


def test_json_is_rows(json_block):
    for line in json_block.code.splitlines():
        row = json.loads(line)
        assert is_pair(row) or detect_dataset_type(row)


def test_diagrams_name_files_that_exist(plain_block):
    package = ROOT / "distill_trainers"
    for line in plain_block.code.splitlines():
        folder = package
        for name in re.findall(r"[\w/]+\.py", line):
            folder = (package / name).parent if "/" in name else folder
            places = (package / name, folder / Path(name).name)
            assert any(place.is_file() for place in places), f"{plain_block.where} names {name}"


# ---- docs/choosing.md -----------------------------------------------------------------------------------------------


def _situations():
    text = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
    table = text[text.index("## Where to start") : text.index("Before a long run")]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] != "you have"]


def test_situations_have_recipes():
    rows = _situations()
    assert len(rows) >= 20 and all(len(row) == 3 for row in rows)
    assert sum("recipes/" in recipe or "the same" in recipe for *_, recipe in rows) >= len(rows) - 1


@pytest.mark.parametrize("row", _situations(), ids=lambda row: row[0][:40])
def test_the_recipe_of_a_situation_takes_its_options(row, monkeypatch):
    monkeypatch.chdir(ROOT)
    linked = re.findall(r"\]\(\.\./(recipes/[^)]*gkd\S*?\.yaml|recipes/\S*?/\w+\.yaml)\)", row[2])
    file = linked[0] if linked else "recipes/llama-3.1-8b/gkd_lora.yaml"  # `the same` is of the row above
    for options in re.findall(r"`(--[^`]+)`", row[2]) or [""]:
        if "quantized" in options and find_spec("bitsandbytes") is None:
            continue
        parsed = parse_recipe(["--config", file, *options.split(), "--use_cpu", "true"])
        for name, value in re.findall(r"`(\w+): ([\w.]+)`", row[1]):
            if hasattr(parsed.args, name) and not hasattr(RecipeArguments, name):
                assert getattr(parsed.args, name) == yaml.safe_load(value), f"{name} of {file}"
